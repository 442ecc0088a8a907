"""What the check looks at: workloads by their executor, in the order in which they run, and files of tests."""

from __future__ import annotations

# The cuda executor runs BLOCKS, of which wide5w1s-5 needs clusters of eight thread blocks; triton runs TRITON.
BLOCKS = ("sin25-5", "sin1024-5", "sin4096-5", "wide5w1s-5", "sin25-1")
TRITON = ("omni5w1s-1", "omni5w1s-5", "mini5w1s-5", "omni20w1s-5", "mini5w5s-5", "torchbench-maml")
# These files have all tests that are marked gpu.
TRITON_TESTS = (
    "tests/test_gpu_train.py", "tests/test_triton.py", "tests/test_triton_shared.py", "tests/test_triton_executor.py",
    "tests/test_triton_tiles.py", "tests/test_triton_products.py", "tests/test_triton_rules.py",
)  # fmt: skip
TESTS = ("tests/test_gpu.py", "tests/test_sampler.py", *TRITON_TESTS)


def executor(workload: str) -> str:
    """Returns the name of the executor that is meant for the workload."""
    return "cuda" if workload in BLOCKS else "triton"
