"""Times the canonical workloads and the layers' cases by pytest-benchmark: ``pytest benchmarks -k "sin25 and
metafast"``.

All of it runs in one process, so ``metafast bench`` is the better judge between libraries. Here
``--benchmark-autosave`` and ``--benchmark-compare`` show what a change did.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import pytest
import torch

from metafast import kernels
from metafast.bench.peers import Metafast, Peer, TorchLoop, peers
from metafast.bench.workloads import WORKLOADS, Workload
from metafast.kernels.contract.case import Case
from metafast.kernels.contract.layer import RuleContext
from metafast.program.capture import capture
from metafast.program.flops import meta_cost
from metafast.program.losses import as_loss
from metafast.verification.agreement import Answer, agreement

# Other libraries warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = 16  # the tasks of a layer's case


def _cases() -> list[Case]:
    """Collects the cases of every layer. Losses are left out: they have other rules and little to do."""
    return [case for module in kernels.modules("cases") for case in module.CASES if isinstance(case, Case)]


@functools.cache
def oracle(workload: Workload) -> Answer:
    return arrays(TorchLoop().prepare(workload, workload.draw().to(torch.float64))())


def arrays(answer: Any) -> Answer:
    def array(value: Any) -> np.ndarray:
        return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float64)

    return array(answer[0]), {name: array(value) for name, value in answer[1].items()}


@pytest.mark.parametrize("peer", [Metafast(), Metafast("reference"), *peers()], ids=lambda peer: peer.name)
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_meta_gradient(benchmark: Any, workload: Workload, peer: Peer) -> None:
    missing = peer.missing(workload, "cpu")
    if missing is not None:
        pytest.skip(missing)
    tasks = workload.draw()
    call = peer.prepare(workload, tasks)
    found = agreement(arrays(call()), oracle(workload))
    assert found.agrees, str(found)
    began = time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    program = capture(workload.network(), as_loss(workload.loss), tasks.support.at(0).x[0], steps=workload.steps)
    benchmark.group = workload.name
    benchmark.pedantic(call, rounds=min(100, max(3, int(2 / seconds))))
    median = benchmark.stats.stats.median
    flops = meta_cost(program, tasks, workload.loop).flops
    benchmark.extra_info.update(tasks_per_s=len(tasks) / median, gflops=flops / median / 1e9, gradient=found.gradient)


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_rules(benchmark: Any, case: Case) -> None:
    """Times the four rules in turn, for a batch of tasks in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(shapes: Any) -> list[torch.Tensor]:
        return [torch.randn(TASKS, *shape, generator=generator) for shape in shapes]

    params, inputs, d_params, d_inputs = draw(case.params), draw(case.inputs), draw(case.params), draw(case.inputs)
    needs = (True,) * len(inputs), (True,) * len(params)
    output = case.layer.forward(RuleContext(case.step, None, *needs), params, inputs, case.constants).shape
    g, gd = (torch.randn(output, generator=generator) for _ in range(2))

    def call() -> None:
        ctx = RuleContext(case.step, None, *needs)
        case.layer.forward(ctx, params, inputs, case.constants)
        case.layer.backward(ctx, params, g)
        case.layer.tangent_forward(ctx, params, d_params, d_inputs)
        case.layer.tangent_backward(ctx, params, d_params, gd)

    benchmark.group = f"rules of {case.layer.kind}"
    with torch.no_grad():
        benchmark(call)
