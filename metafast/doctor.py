"""``metafast doctor``: what this machine has, what it lacks, what that costs, and the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from metafast import MAML, TaskBatch, __version__, plain
from metafast.executors import executors
from metafast.models import mlp

# What each optional package is for, and the extra that brings it.
EXTRAS = {
    "typer": ("train", "the command line"),
    "rich": ("train", "the progress bar"),
    "safetensors": ("train", "checkpoints"),
    "matplotlib": ("train", "pictures and the glyphs data"),
    "PIL": ("train", "reading of pictures"),
    "tensorboard": ("tensorboard", "--tensorboard"),
}
# float32 on a smooth problem: a thousand times its rounding error, far below any wrong formula.
GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``state`` is ``ok``, ``missing`` (something is lost) or ``broken`` (nothing is safe)."""

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
        """Is nothing broken? What is missing only costs speed or comfort."""
        return all(finding.state != "broken" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        verdict = "all results can be trusted" if self.healthy else "something is broken: do not trust results"
        return "\n".join([*map(str, self.findings), verdict])


def examine() -> Findings:
    """Looks at everything."""
    return Findings((*_versions(), *_extras(), *_devices(), *_executors()))


def gradient_error(backend: str, device: str) -> float:
    """The meta-gradient of a small MLP, 3 steps, against autograd: largest difference over largest entry."""
    learner, tasks = _probe(backend, device)
    learner.backward(tasks)
    model = learner.model
    names = {name for name, _ in model.named_parameters()}
    _, grads = plain.meta_gradient(model, nn.functional.mse_loss, tasks, 0.01, 3, names)
    wanted = torch.cat([grads[name].flatten() for name, _ in model.named_parameters()])
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float((found - wanted).abs().max() / wanted.abs().max())


def _probe(backend: str, device: str) -> tuple[MAML, TaskBatch]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 4, 5, 1, generator=generator).to(device) for _ in range(2))
    model = mlp(hidden=(8, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    model.to(device)
    return MAML(model, loss="mse", lr=0.01, steps=3, backend=backend), TaskBatch(x[0], y[0], x[1], y[1])


def _versions() -> Iterator[Finding]:
    yield Finding("ok", "metafast", f"{__version__}, python {platform.python_version()}, torch {torch.__version__}")
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


def _executors() -> Iterator[Finding]:
    yield Finding("ok", "executors", f"{', '.join(e.name for e in executors())} (auto tries them in this order)")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for executor in executors():
        errors, reasons = {}, []
        for device in devices:
            learner, tasks = _probe(executor.name, device)
            reason = executor.refuses(learner.program, tasks.support_x)
            if reason is None:
                errors[device] = gradient_error(executor.name, device)
            else:
                reasons.append(f"{device}: {reason}")
        subject = f"executor {executor.name}"
        if not errors:
            yield Finding("missing", subject, f"cannot run here ({'; '.join(reasons)}); a slower one takes its work")
            continue
        measured = ", ".join(f"{error:.1e} on {device}" for device, error in errors.items())
        good = max(errors.values()) < GRADIENT_TOLERANCE
        remedy = "" if good else "build it again (make setup); if that does not help, report it with this output"
        text = f"its meta-gradient differs from autograd's by {measured} (relative, float32)"
        yield Finding("ok" if good else "broken", subject, text, remedy)
