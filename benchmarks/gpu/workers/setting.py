"""What every worker is told: where it runs, whether it is a rehearsal, where the oracles are, where numbers go."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from metafast import MAML, executors
from metafast.benchmarks import oracles
from metafast.benchmarks.oracles import Oracle
from metafast.benchmarks.workloads import Workload, workload
from metafast.executors.cuda import BlockLimits, NativeCudaExecutor
from metafast.executors.triton import TritonExecutor
from metafast.models import conv4

from ..results import Results
from ..subjects import executor

H100 = BlockLimits(232448, 132)  # shared memory of a block and processors, for the twin


@dataclass(frozen=True)
class Setting:
    """Of this process."""

    device: str
    rehearsal: bool
    oracles: Path | None
    results: Results

    def seconds(self, wanted: float) -> float:
        """For a timing; in a rehearsal a single call is enough."""
        return 0.0 if self.rehearsal else wanted

    def workload(self, name: str) -> Workload:
        """The canonical one; in a rehearsal a tiny one of that name."""
        return tiny(workload(name)) if self.rehearsal else workload(name)

    def oracle(self, chosen: Workload) -> Oracle:
        """Its float64 truth, which is never worked out here: that takes minutes.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.oracles is None:
            raise FileNotFoundError("there are no oracles: make gpu-pack writes them, and --pack names its folder")
        return oracles.load(self.oracles, chosen)

    def learner(self, chosen: Workload, precision: str = "float32") -> MAML:
        """Of the executor that is meant for the workload."""
        model, backend = chosen.network().to(self.device), executor(chosen.name)
        return MAML(
            model, loss=chosen.loss, lr=chosen.lr, steps=chosen.steps, backend=backend, precision=precision
        )  # fmt: skip


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options of ``setting``."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cuda")
    made.add_argument("--rehearse", action="store_true")
    made.add_argument("--oracles", type=Path)
    return made


def setting(options: argparse.Namespace) -> Setting:
    """In a rehearsal the executors are those that stand in for a GPU's."""
    if options.rehearse:
        executors._EXECUTORS[:0] = [NativeCudaExecutor(H100), TritonExecutor(interpreted=True)]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return Setting(options.device, options.rehearse, options.oracles, Results.of_this_process())


def tiny(canonical: Workload) -> Workload:
    """Of the same name and kind, as small as it goes."""
    if canonical.loss == "mse":
        return replace(canonical, tasks=2, steps=min(canonical.steps, 2), shots=3, queries=3)
    if canonical.name.startswith("wide"):
        return replace(canonical, tasks=2, steps=1, queries=1)
    network: Callable[[], torch.nn.Module] = partial(conv4, 2, channels=4, image=(1, 6, 6), pool=True, blocks=1)
    return replace(canonical, network=network, sample=(1, 6, 6), ways=2, shots=1, queries=1, tasks=1, steps=1)
