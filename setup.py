"""The package layout and the extension ``metafast._C``; everything that is not code lives in pyproject.toml.

METAFAST_CPU=0 leaves the extension out and METAFAST_CPU=1 makes a failure to build it an error. By default it is
built where that is possible, and metafast runs without it elsewhere. METAFAST_CUDA says the same of its CUDA part.
METAFAST_ISAS="avx2" builds the inner loop for fewer instruction sets, METAFAST_CXXFLAGS adds flags of the compiler.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# The inner loop is built for each instruction set, and for any machine: bytes in a vector, flags.
ISAS = {
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (64, ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]),
}
WANTED = os.environ.get("METAFAST_ISAS", "avx2,avx512" if platform.machine() in ("x86_64", "AMD64") else "")
BUILDS = {"plain": (16, [])} | {name: ISAS[name] for name in WANTED.split(",") if name}
FLAGS = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"]
CORE = ["core/plan", "core/tables", "core/find_plan", "core/passes", "cpu/isa", "cpu/arena", "cpu/recording"]
CORE = [f"csrc/{name}.cpp" for name in [*CORE, "cpu/team", "cuda/plan_block", "cuda/twin"]]
BINDINGS = ["csrc/bindings.cpp", "csrc/bindings_cuda.cpp"]
KERNELS = "csrc/cuda/inner_loop.cu"


def compile_cuda(target: str) -> dict[str, list[str]]:
    """What the link needs of the kernels, compiled by nvcc alone; nothing where that is not wanted or impossible."""
    wanted, home = os.environ.get("METAFAST_CUDA"), os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if wanted == "0" or (wanted != "1" and nvcc is None):
        return {}
    try:
        run = partial(subprocess.run, check=True, text=True)
        known = run([nvcc or "nvcc", "--list-gpu-arch"], stdout=subprocess.PIPE).stdout
        archs = [a for a in ("80", "90", "100") if f"compute_{a}" in known]
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


class BuildNative(build_ext):
    """Compiles each source with the flags that it needs, side by side."""

    def build_extension(self, ext: Extension) -> None:
        from torch.utils import cpp_extension

        torch_macros = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030a0000")]
        extra = os.environ.get("METAFAST_CXXFLAGS", "").split()
        torch_macros.append(("METAFAST_FLAGS", json.dumps(" ".join(FLAGS + extra))))
        cuda = compile_cuda(os.path.join(self.build_temp, "cuda", "inner_loop.o"))
        torch_macros += [("METAFAST_CUDA", None)] if cuda else []
        jobs = [(s, "bindings", torch_macros, ["-std=c++20"], cpp_extension.include_paths()) for s in BINDINGS]
        built = [(f"METAFAST_{name.upper()}", None) for name in BUILDS]
        jobs += [(s, "core", built, ["-std=c++17"], []) for s in CORE]
        for name, (size, flags) in BUILDS.items():
            macros = [("METAFAST_NAMESPACE", f"metafast::{name}"), ("METAFAST_VECTOR_BYTES", str(size))]
            jobs.append(("csrc/cpu/inner_loop.cpp", name, macros, ["-std=c++17", *flags], []))
        def build(job: tuple) -> list[str]:
            source, folder, macros, flags, includes = job
            return self.compiler.compile(
                [source], os.path.join(self.build_temp, folder), macros, includes, extra_postargs=FLAGS + flags + extra
            )  # fmt: skip

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(build, jobs) for path in paths]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects + cuda.get("objects", []), target, libraries=["torch_cpu", "c10", *cuda.get("libraries", [])],
            library_dirs=cpp_extension.library_paths() + cuda.get("paths", []), extra_postargs=extra, target_lang="c++",
        )  # fmt: skip


def extensions() -> list[Extension]:
    """The extension, or nothing where it is not wanted or torch is not there to build against."""
    wanted = os.environ.get("METAFAST_CPU")
    if wanted == "0":
        return []
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        if wanted == "1":
            raise
        return []
    headers = [str(p) for p in Path("csrc").rglob("*.*")]
    sources = [*BINDINGS, KERNELS, "csrc/cpu/inner_loop.cpp", *CORE]
    return [Extension("metafast._C", sources, depends=headers, py_limited_api=True, optional=wanted != "1")]


packages = [*find_packages(include=["metafast", "metafast.*"]), "metafast.kernels", "metafast.benchmarks"]
packages += [f"metafast.kernels.{p}" for p in find_packages("kernels")]

setup(
    packages=packages,
    package_dir={"metafast.kernels": "kernels", "metafast.benchmarks": "benchmarks"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
