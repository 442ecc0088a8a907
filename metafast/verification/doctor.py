"""``metafast doctor`` says what this machine has, what it lacks, what that costs, and which command mends it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from metafast.executors import CpuExecutor, Executor, executors
from metafast.executors.native import encode
from metafast.machine import VERSION
from metafast.verification.self_check import gradients, probes, refusal, speed

# By optional package: the extra that installs it, and what it is for.
EXTRAS = {
    "typer": ("train", "the command line"),
    "rich": ("train", "the progress bar"),
    "safetensors": ("train", "checkpoints"),
    "matplotlib": ("train", "pictures and the glyphs data"),
    "PIL": ("train", "reading of pictures"),
    "tensorboard": ("tensorboard", "--tensorboard"),
}
_LEAST_SPEED_UP = 1.5  # over a torch loop; even the slowest executor reaches 5 on a busy machine


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``state`` is ``ok``, ``missing`` (it costs speed or comfort) or ``broken`` (results may
    be wrong)."""

    state: str
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"[{self.state:^7}] {self.subject}: {self.text}" + (f"\n{'':10}mend: {self.remedy}" * bool(self.remedy))


@dataclass(frozen=True)
class Findings:
    """The whole report."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Tells whether nothing is broken."""
        return all(finding.state != "broken" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        verdict = "all results can be trusted" if self.healthy else "something is broken: do not trust results"
        return "\n".join([*map(str, self.findings), verdict])


def examine() -> Findings:
    """Looks at versions, optional packages, devices, the extension and every executor."""
    return Findings((*_versions(), *_extras(), *_devices(), *_build(), *_executors()))


def _versions() -> Iterator[Finding]:
    yield Finding("ok", "metafast", f"{VERSION}, python {platform.python_version()}, torch {torch.__version__}")
    newest = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if newest < (2, 10):
        yield Finding(
            "broken", "torch", f"{torch.__version__} is older than 2.10", "pip install --upgrade 'torch>=2.10'"
        )


def _extras() -> Iterator[Finding]:
    for module, (extra, purpose) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            remedy = f'pip install "metafast[{extra}]"'
            yield Finding("missing", module, f"not installed, so no {purpose}", remedy)


def _devices() -> Iterator[Finding]:
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    yield Finding(
        "ok",
        "cpu",
        f"{platform.machine()}, {cores} cores, {threads} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    if threads < cores:
        yield Finding("missing", "threads", f"torch uses {threads} of {cores} cores", f"export OMP_NUM_THREADS={cores}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            text = f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
            yield Finding("ok", f"cuda:{index}", text)
    elif torch.version.cuda is None:
        yield Finding(
            "missing",
            "cuda",
            "this torch is built without CUDA, so everything runs on the CPU",
            "on a machine with an NVIDIA GPU: pip install --force-reinstall torch (a build with CUDA)",
        )
    else:
        yield Finding(
            "missing",
            "cuda",
            f"torch is built for CUDA {torch.version.cuda} but sees no device, so everything runs on the CPU",
            "check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )


def _build() -> Iterator[Finding]:
    """Reports how the extension was compiled and which instructions it uses."""
    rebuild = "pip install --no-build-isolation -e .  (in the checkout; METAFAST_CPU=1 shows why it fails)"
    if encode.extension is None:
        compiler = "" if shutil.which("g++") or shutil.which("clang++") else "a C++ compiler (apt install g++), then "
        reason = (encode.extension_error or "metafast._C is not there").partition("; build")[0]
        yield Finding("missing", "extension", f"{reason}: several times slower on a CPU", compiler + rebuild)
        return
    yield Finding("ok", "extension", encode.extension.compiled)
    found = CpuExecutor.isas()
    if found[0] == "generic" and platform.machine() in ("x86_64", "AMD64"):
        remedy = "a processor with AVX2 and FMA; in a virtual machine, one that passes them on (qemu -cpu host)"
        yield Finding(
            "missing", "instructions", "generic: this processor offers no AVX2, and vectors are half as long", remedy
        )
    else:
        others = f"; this processor also runs {', '.join(found[1:])}" * bool(found[1:])
        yield Finding("ok", "instructions", f"{found[0]} in use{others}")
    if torch.cuda.is_available() and not torch.ops.metafast.cuda_built():
        nvcc = "" if shutil.which("nvcc") else "nvcc on the PATH (CUDA's toolkit), then "
        yield Finding(
            "missing", "CUDA kernels", "the extension is built without them", f"{nvcc}METAFAST_CUDA=1 {rebuild}"
        )


def _executors() -> Iterator[Finding]:
    tried = ", then ".join(executor.name for executor in executors() if executor.proven)
    yield Finding("ok", "executors", f"{', '.join(e.name for e in executors())} (auto tries {tried})")
    for executor in executors():
        yield from _executor(executor, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])


def _executor(executor: Executor, devices: list[str]) -> Iterator[Finding]:
    subject = f"executor {executor.name}"
    certificates = {device: gradients(executor, device) for device in devices}
    if not any(certificates.values()):
        reasons = dict.fromkeys(str(refusal(executor, probe)) for device in devices for probe in probes(device))
        text = f"cannot run here ({'; '.join(reasons)}); a slower one takes its work"
        return (yield Finding("missing", subject, text, executor.remedy))
    for device, found in certificates.items():
        for name, certificate in found.items():
            error = max(check.error for check in certificate.checks if check.name == "meta-gradient")
            text = f"its meta-gradient of {name} on {device} differs from autograd's by {error:.1e} (relative)"
            if certificate.passed:
                yield Finding("ok", subject, text)
            else:
                remedy = "build it again (make setup); if that does not help, report it with this output"
                yield Finding("broken", subject, f"{text}: {certificate.verdict}", remedy)
        if found:
            yield _speed(executor, device)


def _speed(executor: Executor, device: str) -> Finding:
    measured = speed(executor, device)
    text = (
        f"{1e3 * measured.metafast:.2f} ms for a meta-gradient of 25 sinusoid tasks on {device}, "
        f"{measured.ratio:.1f} times as fast as a torch loop"
    )
    slow = measured.ratio < _LEAST_SPEED_UP
    remedy = "close what else uses the machine and look again; then: metafast profile sin25-5 --out profile" * slow
    return Finding("missing" if slow else "ok", f"speed of {executor.name}", text, remedy)
