"""Holds the Triton executor, which runs layers as kernels over (task, tile)."""
