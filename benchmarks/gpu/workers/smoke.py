"""Checks the workloads of one executor: a meta-gradient against the oracle, the same bits twice, times and memory."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metafast import MAML
from metafast.bench.run import exact_path
from metafast.profile.gpu import kernels
from metafast.tasks import TaskBatch
from metafast.verification.agreement import Answer, agreement

from ..subjects import executor
from .setting import Setting, parser, setting
from .timing import graph_ms, host_ms

SECONDS = 0.3  # how long each timing lasts
PUBLISHED = "torchbench-maml"  # PyTorch's published time of this workload has an Adam step in it
# After one of these every call to CUDA in the process fails.
_SPOILED = ("illegal", "misaligned", "launch failure", "device-side assert", "hardware")


def check(name: str, where: Setting) -> bool:
    """Checks one workload and adds every result as soon as it exists. Tells whether the workload is right."""
    chosen = where.workload(name)
    truth, tasks, learner = where.oracle(chosen), chosen.draw().to(where.device), where.learner(chosen)
    if where.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    first = answer(learner, tasks)
    found = agreement(arrays(first), truth)
    right = found.agrees and (found.exact or not exact_path(chosen))
    where.results.add(
        name, gradient_error=found.gradient, losses_error=found.losses, worst=found.parameter,
        worst_error=found.parameter_error, right=right, first_call_s=time.perf_counter() - began,
    )  # fmt: skip
    same = _same(first, answer(learner, tasks))
    where.results.add(name, same_bits=same)
    _measure(name, where, learner, tasks)
    return right and same


def _measure(name: str, where: Setting, learner: MAML, tasks: TaskBatch) -> None:
    seconds = where.seconds(SECONDS)

    def call() -> None:
        learner.zero_grad(set_to_none=True)
        learner.backward(tasks)

    eager = host_ms(call, where.device, seconds)
    peak = torch.cuda.max_memory_allocated() / 1e6 if where.device != "cpu" else None
    where.results.add(name, eager_ms=eager, peak_mb=peak)
    replay, on_gpu = graph_ms(call, where.device, seconds)
    where.results.add(name, graph_ms=replay, kernels_ms=on_gpu, **_stand_in(where))
    if name == PUBLISHED:
        adam = torch.optim.Adam(learner.parameters(), lr=1e-3)

        def step() -> None:
            call()
            adam.step()

        where.results.add(name, with_adam_ms=host_ms(step, where.device, seconds))
    if where.device != "cpu" and executor(name) == "triton":  # the cuda executor has only one kernel
        longest = [[k["name"][:80], round(1e3 * k["seconds"], 4), k["calls"]] for k in kernels(call, 3)[:8]]
        where.results.add(name, longest_kernels_ms_calls=longest)


def answer(learner: MAML, tasks: TaskBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns copies of the losses ``[T]`` and of the gradient by parameter."""
    learner.zero_grad(set_to_none=True)
    losses = learner.backward(tasks).losses
    named = learner.model.named_parameters()
    return losses.clone(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def arrays(found: tuple[Tensor, dict[str, Tensor]]) -> Answer:
    """Converts losses and gradient to what ``agreement`` takes."""

    def array(x: Tensor) -> Any:
        return np.asarray(x.detach().cpu(), dtype=np.float64)

    return array(found[0]), {name: array(value) for name, value in found[1].items()}


def _same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> bool:
    pairs = [(a[0], b[0]), *((a[1][name], b[1][name]) for name in a[1])]
    return all(torch.equal(x, y) for x, y in pairs)


def _stand_in(where: Setting) -> dict[str, str]:
    return {"stand_in": "there are no CUDA graphs on a CPU"} if where.device == "cpu" else {}


def main() -> int:
    """Checks all workloads. Returns 0 if they are right."""
    options = parser(__doc__)
    options.add_argument("workloads", nargs="+")
    given = options.parse_args()
    where, good = setting(given), True
    for place, name in enumerate(given.workloads):
        try:
            good = check(name, where) and good
        except Exception as error:
            good = False
            where.results.add(name, error=f"{type(error).__name__}: {error}"[:400])
            if any(word in str(error) for word in _SPOILED):
                where.results.add("the group", stopped_before=given.workloads[place + 1 :])
                break
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
