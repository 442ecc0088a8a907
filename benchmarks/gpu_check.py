"""Checks, in one command, everything that only a GPU can show:

    python3 benchmarks/gpu_check.py --plan first --out DIR

It needs a python3 with torch, setuptools and pytest, and a C compiler for Triton's launchers. It needs no make, no
virtual environment and no network, and with a pack of ``make gpu-pack`` no nvcc. ``gpu/plans.py`` lists the steps;
``--rehearse`` goes through them without a GPU.
"""

import sys

from gpu.command import main  # Python looks in this file's folder first

if __name__ == "__main__":
    sys.exit(main())
