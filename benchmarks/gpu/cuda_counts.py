"""Counts what the assembler made of the CUDA executor's kernels: instructions by kind, registers, memory. No GPU is
needed.

    python -m benchmarks.gpu.cuda_counts [FILE ...]

Each file is a cubin, an object of nvcc, or an extension built with CUDA; without one, the installed extension is read.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

KINDS = {
    "LDG": "reads of global memory",
    "LD": "reads of memory that may be shared or global",
    "LDS": "reads of shared memory",
    "LDC": "reads of the constant bank, one by each lane",
    "ULDC": "reads of the constant bank, one for a warp",
    "LDCU": "the same as ULDC, on sm_100",
    "LDL": "reads of local memory",
    "STL": "writes of local memory",
    "FFMA": "multiply-adds",
    "HMMA": "products on tensor cores",
    "BAR": "barriers of a block",
    "all": "instructions",
}
_FUNCTION = re.compile(r"Function\s*:?\s+(\w+):?\s*$")
_ARCH = re.compile(r"arch = (sm_\w+)|code for (sm_\w+)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z]\w*)")
_RESOURCE = re.compile(r"(REG|STACK):(\d+)")


def counts(path: Path) -> dict[str, dict[str, Counter[str]]]:
    """Counts the instructions in ``path`` by architecture, kernel and opcode.

    ``"all"`` counts all instructions; ``"REG"`` and ``"STACK"`` are the registers and bytes of local memory of a
    thread.

    Raises:
        FileNotFoundError: cuobjdump is not installed.
    """
    found: dict[str, dict[str, Counter[str]]] = {}
    for option in ("-sass", "--dump-resource-usage"):
        arch = kernel = ""  # only the listing of a cubin's code, which comes first, says its architecture
        for line in _dump(option, path).splitlines():
            if name := _ARCH.search(line):
                arch = name[1] or name[2]
            elif name := _FUNCTION.search(line):
                kernel = name[1]
            if not kernel:
                continue
            counter = found.setdefault(arch or next(iter(found)), {}).setdefault(kernel, Counter())
            if opcode := _INSTRUCTION.search(line):
                counter.update((opcode[1], "all"))
            counter.update({key: int(value) for key, value in _RESOURCE.findall(line)})
    return found


def table(path: Path) -> list[str]:
    """Returns the lines of a Markdown table."""
    columns = [*KINDS, "REG", "STACK"]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for arch, kernels in counts(path).items():
        for kernel, counter in kernels.items():
            lines.append(f"| {arch} {kernel} | {' | '.join(f'{counter[c]:,}' for c in columns)} |")
    return lines


def _dump(option: str, path: Path) -> str:
    return subprocess.run([_cuobjdump(), option, path], capture_output=True, text=True, check=True).stdout


def _cuobjdump() -> str:
    """Finds cuobjdump in the CUDA toolkit or in Triton."""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if triton := find_spec("triton"):
        homes.append(Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin")
    for candidate in ("cuobjdump", *(str(home / "cuobjdump") for home in homes)):
        if tool := shutil.which(candidate):
            return tool
    raise FileNotFoundError("cuobjdump is not on PATH, in CUDA_HOME/bin or in triton: install Triton or a CUDA toolkit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=f"Columns: {KINDS}")
    parser.add_argument("files", nargs="*", type=Path)
    files = parser.parse_args().files
    if not files:
        extension = find_spec("metafast._C")
        if extension is None or extension.origin is None:
            parser.error("metafast._C is not installed: build it with METAFAST_CUDA=1, or name a file")
        files = [Path(extension.origin)]
    for path in files:
        print(path.name, *table(path), "", sep="\n")


if __name__ == "__main__":
    main()
