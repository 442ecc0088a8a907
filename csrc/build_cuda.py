"""Compiles the CUDA kernels, by nvcc alone: no torch header, no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from functools import partial

KERNELS = "csrc/cuda/kernels.cu"
# Compute capabilities, where METAFAST_ARCHS names none; for later ones the last goes along as PTX.
ARCHS = "80,90,100"


def compile_cuda(target: str) -> dict[str, list[str]]:
    """Compiles into the object file ``target``. Returns what a link needs: ``objects``, ``libraries``, ``paths``.

    METAFAST_CUDA=0: compiles and returns nothing. METAFAST_CUDA=1: an error is raised. Else nvcc is used where it is,
    and an error is a warning. METAFAST_ARCHS="90" compiles for those compute capabilities alone.
    """
    wanted, home = os.environ.get("METAFAST_CUDA"), os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if wanted == "0" or (wanted != "1" and nvcc is None):
        return {}
    run = partial(subprocess.run, check=True, text=True)
    try:
        archs = _capabilities(run([nvcc or "nvcc", "--list-gpu-arch"], stdout=subprocess.PIPE).stdout)
        code = [f"-gencode=arch=compute_{a},code=[sm_{a}{f',compute_{a}' * (a == archs[-1])}]" for a in archs]
        os.makedirs(os.path.dirname(target), exist_ok=True)
        run([nvcc, "-c", "-O3", "-std=c++17", "-Xcompiler=-fPIC", "--threads=2", *code, KERNELS, "-o", target])
        link = run([nvcc, "--dryrun", target], stderr=subprocess.PIPE).stderr
    except (subprocess.CalledProcessError, OSError) as error:
        if wanted == "1":
            raise
        warnings.warn(f"metafast is built without CUDA: {error}", stacklevel=1)
        return {}
    libraries = ["cudart_static", "dl", "rt", "pthread"]
    return {"objects": [target], "libraries": libraries, "paths": re.findall(r'"-L([^"]+)"', link)}


def _capabilities(listed: str) -> list[str]:
    """Those of METAFAST_ARCHS, all of which nvcc must have ``listed``; without it those of ``ARCHS`` that it knows."""
    known, named = re.findall(r"compute_(\w+)", listed), os.environ.get("METAFAST_ARCHS")
    archs = (named or ARCHS).split(",")
    unknown = [a for a in archs if a not in known]
    if named and unknown:
        raise ValueError(f"METAFAST_ARCHS={named!r}: nvcc does not know {unknown[0]!r}, but {', '.join(known)}")
    return [a for a in archs if a in known]
