"""The options of every worker: its device, whether it is a rehearsal, the oracles, and where results go."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from metafast import MAML, executors
from metafast.bench import oracles
from metafast.bench.oracles import Oracle
from metafast.bench.workloads import Workload, workload
from metafast.executors.native.cuda import BlockLimits, CudaExecutor
from metafast.executors.triton.executor import TritonExecutor
from metafast.models import conv4

from ..results import Results
from ..subjects import executor

H100 = BlockLimits(232448, 132)  # bytes of shared memory of a block, and multiprocessors, for the twin


@dataclass(frozen=True)
class Setting:
    """The options of this process."""

    device: str
    rehearsal: bool
    oracles: Path | None
    results: Results

    def seconds(self, wanted: float) -> float:
        """Returns the seconds of a timing: ``wanted``, or 0 in a rehearsal, where one call is enough."""
        return 0.0 if self.rehearsal else wanted

    def workload(self, name: str) -> Workload:
        """Returns the canonical workload; in a rehearsal it is a tiny one of that name."""
        return tiny(workload(name)) if self.rehearsal else workload(name)

    def oracle(self, chosen: Workload) -> Oracle:
        """Reads the float64 oracle. It is never computed here, because that takes minutes.

        Raises:
            FileNotFoundError: there is no oracle of this workload.
        """
        if self.oracles is None:
            raise FileNotFoundError("there are no oracles: make gpu-pack writes them, and --pack names its folder")
        return oracles.load(self.oracles, chosen)

    def learner(self, chosen: Workload, precision: str = "float32") -> MAML:
        """Makes a learner on the executor that is meant for the workload."""
        model, backend = chosen.network().to(self.device), executor(chosen.name)
        return chosen.learner(model, backend=backend, precision=precision)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Makes a parser with the options that ``setting`` reads."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cuda")
    made.add_argument("--rehearse", action="store_true")
    made.add_argument("--oracles", type=Path)
    return made


def setting(options: argparse.Namespace) -> Setting:
    """Prepares this process. In a rehearsal it registers executors that stand in for a GPU's."""
    if options.rehearse:
        executors._EXECUTORS[:0] = [CudaExecutor(H100), TritonExecutor(interpreted=True)]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return Setting(options.device, options.rehearse, options.oracles, Results.of_this_process())


def tiny(canonical: Workload) -> Workload:
    """Returns a workload with the same name and loss that is as small as possible."""
    if canonical.loss == "mse":
        return replace(canonical, tasks=2, steps=min(canonical.steps, 2), shots=3, queries=3)
    if canonical.name.startswith("wide"):
        return replace(canonical, tasks=2, steps=1, queries=1)
    network: Callable[[], torch.nn.Module] = partial(conv4, 2, channels=4, image=(1, 6, 6), pool=True, blocks=1)
    return replace(canonical, network=network, sample=(1, 6, 6), ways=2, shots=1, queries=1, tasks=1, steps=1)
