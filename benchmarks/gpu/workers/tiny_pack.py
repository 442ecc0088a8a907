"""Makes a pack for a rehearsal, which has only oracles of the tiny workloads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from metafast.bench import oracles
from metafast.bench.workloads import workload

from ..subjects import BLOCKS, TRITON
from .setting import tiny


def main() -> None:
    """Writes the pack into the folder that the command line names."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name in (*BLOCKS, *TRITON):
        chosen = tiny(workload(name))
        oracles.save(folder / "oracles", chosen, oracles.compute(chosen))
    (folder / "pack.json").write_text(json.dumps({"commit": None, "versions": {}, "files": {}}))


if __name__ == "__main__":
    main()
