"""Describes the machine. It fails if there is no GPU, or if metafast is built without CUDA kernels."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .setting import parser

PACKAGES = (
    "torch", "triton", "jax", "higher", "numpy", "setuptools", "pytest", "pytest-xdist", "metafast", "typer",
)  # fmt: skip
_QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def describe() -> dict[str, Any]:
    """Returns a description of the machine as JSON values."""
    found: dict[str, Any] = {
        "python": platform.python_version(), "gpu": None,
        "versions": {name: _version(name) for name in PACKAGES}, "cuda": torch.version.cuda,
        "nvcc": _output("nvcc", "--version")[-1:],
    }  # fmt: skip
    if torch.cuda.is_available():
        has = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": has.name, "memory": has.total_memory, "processors": has.multi_processor_count,
            "capability": [has.major, has.minor], "shared_memory": has.shared_memory_per_multiprocessor,
            "shared_memory_of_a_block": getattr(has, "shared_memory_per_block_optin", None), "l2": has.L2_cache_size,
            "nvidia-smi": dict(zip(_QUERY.split(","), ", ".join(_output(
                "nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")[:1]).split(", "), strict=False)),
        }  # fmt: skip
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(program: str, *arguments: str) -> list[str]:
    path = shutil.which(program)
    if path is None:
        return []
    return subprocess.run([path, *arguments], capture_output=True, text=True).stdout.strip().splitlines()


def main() -> str | None:
    """Writes the description. Returns what is missing, as the text to exit with."""
    options = parser(__doc__)
    options.add_argument("file", type=Path)
    given = options.parse_args()
    found = describe()
    given.file.write_text(json.dumps(found))
    if found["gpu"] is None and not given.rehearse:
        return "there is no GPU here: torch.cuda.is_available() is false; --rehearse does without"
    import metafast.executors  # noqa: F401  registers the extension's operators

    if not torch.ops.metafast.cuda_built():
        return "the extension is built without CUDA"
    return None


if __name__ == "__main__":
    sys.exit(main())
