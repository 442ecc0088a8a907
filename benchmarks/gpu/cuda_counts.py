"""What the assembler made of the block kernels: instructions by kind, registers, memory. It needs no GPU.

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
    "LD": "of memory that may be shared or global",
    "LDS": "of shared memory",
    "LDC": "of the constant bank, a lane each",
    "ULDC": "once for a warp",
    "LDCU": "the same on sm_100",
    "LDL": "of local memory",
    "STL": "and writes there",
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
    """By architecture and kernel: the opcodes of ``KINDS`` and of all others, ``"all"`` of them, and ptxas's registers
    (``"REG"``) and bytes of local memory (``"STACK"``) for each thread.

    Raises:
        FileNotFoundError: cuobjdump is not here.
    """
    found: dict[str, dict[str, Counter[str]]] = {}
    for option in ("-sass", "--dump-resource-usage"):
        arch = kernel = ""  # of a cubin only the listing of its code says for which architecture it is
        for line in _dump(option, path).splitlines():
            if name := _ARCH.search(line):
                arch = name[1] or name[2]
            elif name := _FUNCTION.search(line):
                kernel = name[1]
            if not kernel:
                continue
            of = found.setdefault(arch or next(iter(found)), {}).setdefault(kernel, Counter())
            if opcode := _INSTRUCTION.search(line):
                of.update((opcode[1], "all"))
            of.update({key: int(value) for key, value in _RESOURCE.findall(line)})
    return found


def table(path: Path) -> list[str]:
    """The lines of a Markdown table."""
    columns = [*KINDS, "REG", "STACK"]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for arch, kernels in counts(path).items():
        for kernel, of in kernels.items():
            lines.append(f"| {arch} {kernel} | {' | '.join(f'{of[c]:,}' for c in columns)} |")
    return lines


def _dump(option: str, path: Path) -> str:
    return subprocess.run([_cuobjdump(), option, path], capture_output=True, text=True, check=True).stdout


def _cuobjdump() -> str:
    """Of the CUDA toolkit, or the one that comes with Triton."""
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
