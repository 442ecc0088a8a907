"""Holds the reference executor, which is plain PyTorch on any device."""
