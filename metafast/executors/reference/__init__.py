"""The reference executor: plain PyTorch on any device."""
