"""What ``benchmarks/gpu_check.py`` does on a machine with a GPU, and what is prepared for it elsewhere."""
