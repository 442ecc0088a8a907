"""The workloads of the check, by the executor that is meant for each, in the order in which they are tried."""

from __future__ import annotations

BLOCKS = ("sin25-5", "sin1024-5", "sin4096-5", "wide5w1s-5", "sin25-1")  # CUDA C++; wide: clusters of eight blocks
TRITON = ("omni5w1s-1", "omni5w1s-5", "mini5w1s-5", "omni20w1s-5", "mini5w5s-5", "torchbench-maml")


def executor(workload: str) -> str:
    """Its executor's name."""
    return "native-cuda" if workload in BLOCKS else "triton"
