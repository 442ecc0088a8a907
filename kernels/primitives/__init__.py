"""What the Triton kernels of all layers are made of."""
