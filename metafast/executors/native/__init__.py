"""Holds the executors whose rules are C++, on the CPU and on a GPU."""
