"""One thread, or OMP_NUM_THREADS, and fixed seeds, so that a test sees the same numbers alone and beside others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
# benchmarks/ is not installed. It comes last, so that metafast is the one that was installed or put on PYTHONPATH.
sys.path.append(str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whichever test comes first


def pytest_configure(config):
    # The first call of torch.func.jvp scripts torch's own decompositions.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
