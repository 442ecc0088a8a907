"""Everything that only a GPU can show, in one command: ``python3 benchmarks/gpu_check.py --plan first --out DIR``.

It needs a python3 with torch, setuptools and pytest, and a C compiler for Triton's launchers: no make, no virtual
environment, no network, and with a pack of ``make gpu-pack`` no nvcc. ``gpu/plans.py`` says what it does;
``--rehearse`` does the same without a GPU.
"""

import sys

from gpu.command import main  # this file's folder is where Python looks first

if __name__ == "__main__":
    sys.exit(main())
