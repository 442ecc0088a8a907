"""The Triton executor: layers as kernels over (task, tile)."""
