"""The package layout and the extension ``metafast._C``; everything that is not code lives in pyproject.toml.

METAFAST_CPU=0 leaves the extension out and METAFAST_CPU=1 makes a failure to build it an error. By default it is
built where that is possible, and metafast runs without it elsewhere. METAFAST_CUDA says the same of its CUDA part.
METAFAST_ISAS="avx2" builds the inner loop for fewer instruction sets, METAFAST_ARCHS="90" the kernels for fewer
compute capabilities, METAFAST_CXXFLAGS adds flags of the compiler.
"""

import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from build_cuda import KERNELS, compile_cuda

# The inner loop is built for each instruction set, and for any machine: bytes in a vector, flags.
ISAS = {
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (64, ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]),
}
WANTED = os.environ.get("METAFAST_ISAS", "avx2,avx512" if platform.machine() in ("x86_64", "AMD64") else "")
BUILDS = {"generic": (16, [])} | {name: ISAS[name] for name in WANTED.split(",") if name}
EXTRA = os.environ.get("METAFAST_CXXFLAGS", "").split()
FLAGS = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi", *EXTRA]
INNER_LOOP = "csrc/cpu/inner_loop.cpp"
BINDINGS = sorted(map(str, Path("csrc/torch").glob("*.cpp")))  # they alone include torch's headers
CORE = sorted({str(p) for p in Path("csrc").rglob("*.cpp")} - {*BINDINGS, INNER_LOOP})
HEADERS = [str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".cuh", ".py")]


class BuildNative(build_ext):
    """Compiles each source with the flags that it needs, side by side."""

    def build_extension(self, ext: Extension) -> None:
        from torch.utils import cpp_extension

        macros = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030a0000")]
        macros += [("METAFAST_FLAGS", json.dumps(" ".join(FLAGS)))]
        jobs = []
        for name, (size, flags) in reversed(BUILDS.items()):  # the longest first
            inner = [("METAFAST_NAMESPACE", f"metafast::{name}"), ("METAFAST_VECTOR_BYTES", str(size))]
            jobs.append((INNER_LOOP, name, inner, ["-std=c++17", *flags], []))
        built = [(f"METAFAST_{name.upper()}", None) for name in BUILDS]
        jobs += [(source, "core", built, ["-std=c++17"], []) for source in CORE]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = pool.submit(compile_cuda, os.path.join(self.build_temp, "cuda", "kernels.o"))
            compiled = [pool.submit(self._compile, job) for job in jobs]
            cuda = kernels.result()
            macros += [("METAFAST_CUDA", None)] if cuda else []
            jobs = [(source, "bindings", macros, ["-std=c++20"], cpp_extension.include_paths()) for source in BINDINGS]
            compiled += [pool.submit(self._compile, job) for job in jobs]
        objects = [path for job in compiled for path in job.result()]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects + cuda.get("objects", []), target, libraries=["torch_cpu", "c10", *cuda.get("libraries", [])],
            library_dirs=cpp_extension.library_paths() + cuda.get("paths", []), extra_postargs=EXTRA, target_lang="c++",
        )  # fmt: skip

    def _compile(self, job: tuple) -> list[str]:
        source, name, macros, flags, includes = job
        folder = os.path.join(self.build_temp, name)
        return self.compiler.compile([source], folder, macros, includes, extra_postargs=FLAGS + flags)


def extensions() -> list[Extension]:
    """The extension, or nothing where it is not wanted or torch is not there to build against."""
    wanted = os.environ.get("METAFAST_CPU")
    if wanted == "0" or (wanted != "1" and find_spec("torch") is None):
        return []
    sources = [*BINDINGS, *CORE, INNER_LOOP, KERNELS]
    return [Extension("metafast._C", sources, depends=HEADERS, py_limited_api=True, optional=wanted != "1")]


packages = find_packages(include=["metafast", "metafast.*"])
packages += ["metafast.kernels", *(f"metafast.kernels.{p}" for p in find_packages("kernels"))]

setup(
    packages=packages,
    package_dir={"metafast.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
