"""The peers of the benchmark: on every kind of workload each computes what metafast computes, or says why not."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.compiler.config
from torch import nn

from metafast.bench.functional_peers import MixedMode, TorchCompile, TorchVmap
from metafast.bench.jax_peer import Jax
from metafast.bench.peers import Answer, Higher, Learn2Learn, Metafast, Peer, TorchLoop, TorchOpt
from metafast.bench.run import _cost
from metafast.bench.table import markdown, title
from metafast.bench.worker import Worker
from metafast.bench.workloads import LR, Workload, workload
from metafast.inner.rules import SGD, Adam, RMSprop
from metafast.models import conv4, mlp
from metafast.verification.agreement import agreement
from metafast.verification.inner_updates import InnerUpdate


def tiny_mlp(inputs: int, outputs: int) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = mlp(inputs, outputs, (6,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.6, 0.6, generator=generator)
    return model


def tiny(canonical_name: str, **changes: Any) -> Workload:
    """The canonical workload of that name, as small as it can be."""
    canonical = workload(canonical_name)
    if canonical.loss == "mse":
        sizes: dict[str, Any] = {"network": partial(tiny_mlp, 1, 1), "tasks": 3, "shots": 4, "queries": 4}
    elif canonical.each_step:
        sizes = {"network": partial(tiny_mlp, 8, 3), "sample": (8,), "ways": 3, "shots": 5, "queries": 6, "steps": 7}
    else:
        network = partial(conv4, 2, channels=3, image=(1, 6, 6), pool=True, blocks=1)
        sizes = {
            "network": network, "sample": (1, 6, 6), "ways": 2, "queries": 2, "tasks": 2, "steps": 3, "lr": 0.05,
        }  # fmt: skip
    return replace(canonical, **{**sizes, **changes})


KINDS = {
    w.name: w
    for w in (
        tiny("sin25-5"),
        tiny("sin25-5-adam"),
        tiny("omni5w1s-5"),
        tiny("omni5w1s-5-momentum"),
        tiny("bilevel-1000"),
        tiny("bilevel-1000", name="bilevel-adam", tasks=2, inner=Adam()),
        tiny("bilevel-1000", name="bilevel-momentum", tasks=2, inner=SGD(momentum=0.5)),
    )
}
# TorchOpt corrects Adam's moments in float32, whatever the dtype of the parameters.
ROUNDING = {("TorchOpt", "sin25-5-adam"): 1e-4, ("TorchOpt", "bilevel-adam"): 1e-4}


def arrays(answer: Answer) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    def array(value: Any) -> np.ndarray:
        return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float64)

    return array(answer[0]), {name: array(value) for name, value in answer[1].items()}


@pytest.fixture(autouse=True)
def _compiler_caches() -> Iterator[None]:
    """torch.compile's peer turns them off in the process that it has for itself, and here it has not."""
    with torch.compiler.config.patch(force_disable_caches=False):
        yield


def answer(peer: Peer, w: Workload, dtype: torch.dtype) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What the second call gives, so that a call cannot spoil the next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        missing = peer.missing(w, "cpu")
        if missing is not None:
            pytest.skip(missing)
        peer.load()
        call = peer.prepare(w, w.draw().to(dtype))
        call()
        return arrays(call())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "peer",
    [
        Metafast(), Metafast("reference"), TorchVmap(), MixedMode(), Learn2Learn(), Higher(), TorchOpt(),
        pytest.param(Jax(), marks=pytest.mark.slow),
    ],
    ids=lambda peer: peer.name,
)  # fmt: skip
def test_peers_agree(peer: Peer, name: str) -> None:
    """In float64 to the last figures; JAX computes in float32 alone."""
    w = KINDS[name]
    right = answer(TorchLoop(), w, torch.float64)
    assert set(right[1]) == {n for n, _ in w.network().named_parameters()} | ({LR} if w.learns_lr else set())
    own = peer.name != "JAX jit(vmap)"
    found = agreement(answer(peer, w, torch.float64 if own else torch.float32), right)
    limit = ROUNDING.get((peer.name, name), 1e-11) if own else 1e-4
    assert max(found.losses, found.gradient, found.parameter_error) < limit, str(found)


@pytest.mark.parametrize("name", KINDS)
def test_float32_is_enough(name: str) -> None:
    right = answer(TorchLoop(), KINDS[name], torch.float64)
    for peer in (Metafast(), TorchLoop(), MixedMode()):
        assert agreement(answer(peer, KINDS[name], torch.float32), right).exact


@pytest.mark.slow
@pytest.mark.skipif(TorchCompile().missing(KINDS["sin25-5"], "cpu") is not None, reason="there is no compiler")
def test_a_long_loop_is_compiled_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metafast.bench.functional_peers._LONG", 3)
    w = KINDS["bilevel-momentum"]
    found = agreement(answer(TorchCompile(), w, torch.float32), answer(TorchLoop(), w, torch.float64))
    assert found.exact


def test_second_order_and_the_rate_matter() -> None:
    """Neither a first-order gradient nor one without the rule would pass."""
    for name in ("sin25-5-adam", "omni5w1s-5-momentum", "bilevel-1000"):
        w = KINDS[name]
        right = answer(TorchLoop(), w, torch.float64)
        model = w.network().double()
        learner = w.learner(model, first_order=True)
        losses = learner.backward(w.draw().to(torch.float64)).losses
        grads = {n: p.grad for n, p in model.named_parameters()}
        assert not agreement(arrays((losses, grads)), right).agrees, name
        if w.inner.states:
            assert not agreement(answer(TorchLoop(), replace(w, inner=SGD()), torch.float64), right).agrees


@pytest.mark.parametrize(
    ("inner", "optimizer"),
    [
        (SGD(), partial(torch.optim.SGD, lr=0.1)),
        (SGD(momentum=0.9), partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        (Adam(betas=(0.8, 0.99), eps=1e-3), partial(torch.optim.Adam, lr=0.1, betas=(0.8, 0.99), eps=1e-3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_inner_updates_are_those_of_torch(inner: Any, optimizer: Any) -> None:
    leaf = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    steps, update = optimizer([leaf]), InnerUpdate(inner, 0.1, torch)
    params = {"p": leaf.detach().clone()}
    state = update.start(params)
    for count in range(1, 4):
        gradient = torch.cos(count * params["p"])
        gradient[0] = 0
        leaf.grad = gradient
        params, state = update(params, {"p": gradient}, state, count)
        steps.step()
        torch.testing.assert_close(params["p"], leaf.detach())


@pytest.mark.parametrize(
    "inner", [RMSprop(), SGD(weight_decay=0.1), SGD(momentum=0.9, nesterov=True), Adam(max_norm=1)]
)
def test_peers_refuse_rules_that_they_do_not_know(inner: Any) -> None:
    with pytest.raises(ValueError, match="peers know"):
        TorchLoop().prepare(replace(KINDS["sin25-5"], inner=inner), KINDS["sin25-5"].draw())


def test_learn2learn_cannot_take_a_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "learn2learn/algorithms").mkdir(parents=True)
    (tmp_path / "learn2learn/algorithms/maml.py").touch()
    monkeypatch.setenv("METAFAST_LEARN2LEARN", str(tmp_path))
    assert Learn2Learn().missing(KINDS["sin25-5"], "cpu") is None
    assert "cannot" in str(Learn2Learn().missing(KINDS["sin25-5-adam"], "cpu"))


def test_canonical_long_loop() -> None:
    """1,000 steps of 64 new samples each; they are drawn by the seed, and all classes come up."""
    w = workload("bilevel-1000")
    assert (w.steps, w.shots, w.queries, w.tasks) == (1000, 64, 256, 1)
    assert sum(p.numel() for p in w.network().parameters()) == 784 * 128 + 128 + 1290
    short = replace(w, steps=3)
    tasks = short.draw()
    assert tasks.support_x.shape == (3, 1, 64, 784)
    assert tasks.query_x.shape == (1, 256, 784)
    assert tasks.each_step
    assert not torch.equal(tasks.support_x[0], tasks.support_x[1])
    assert torch.equal(tasks.support_x, short.draw().support_x)
    assert not torch.equal(tasks.support_x, short.draw(1).support_x)
    assert (tasks.support_y.flatten().bincount(minlength=10) > 0).all()


def test_costs_of_states_and_of_samples_for_each_step() -> None:
    """Elementwise work has no FLOPs; the state is kept as theta is, and samples of each step are read twice."""
    plain, adam = _cost(KINDS["sin25-5"]), _cost(KINDS["sin25-5-adam"])
    assert adam["flops"] == plain["flops"]
    assert adam["least_bytes"] - plain["least_bytes"] == 4 * 3 * 2 * 5 * 2 * plain["parameters"]
    long = _cost(KINDS["bilevel-1000"])
    forward, first = 2 * (8 * 6 + 6 * 3), 2 * 8 * 6
    assert long["flops"] == 7 * 5 * (9 * forward - 5 * first) + 6 * (3 * forward - first)
    size = long["parameters"]
    assert long["least_bytes"] == 4 * (2 * 7 * 5 * 8 + 6 * 8 + 2 * 7 * size + 3 * size)


def test_a_worker_tells_memory_beyond_the_samples() -> None:
    """In a loop that autograd records, more steps need more memory, by a few times the parameters each."""
    network = partial(mlp, 64, 3, (8192,))
    size = 4 * (64 * 8192 + 8192 + 3 * 8192 + 3)  # bytes of the parameters

    def peak(steps: int) -> dict[str, int]:
        w = replace(KINDS["bilevel-1000"], network=network, sample=(64,), steps=steps)
        worker = Worker(TorchLoop(), w, "cpu", 1)
        try:
            worker.first(100)
            return worker.turn(0.01, 100)[1]
        finally:
            worker.close()

    # A system that takes idle pages back from a process shows less than that needs, and never more.
    found = [max((peak(steps) for _ in range(3)), key=lambda p: p.get("beyond_data", 0)) for steps in (40, 120)]
    if sys.platform == "linux":
        beyond = [peak["beyond_data"] for peak in found]
        assert 80 * size < beyond[1] - beyond[0] < 80 * 10 * size
        assert all(0 < peak["beyond_data"] < peak["host"] for peak in found)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is one of /proc")
def test_the_peak_begins_anew() -> None:
    code = (
        "import torch; from metafast.bench.worker import peak_bytes, restart_peak; a = torch.ones(1 << 28); del a;"
        "high = peak_bytes(); held = restart_peak('cpu'); print(high - held); b = torch.ones(1 << 26);"
        "print(peak_bytes() - held)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    freed, kept = map(int, run.stdout.split())
    assert freed > 0.99 * 2**30
    assert 2**28 <= kept < 1.1 * 2**28


def test_a_table_says_the_memory_of_long_loops() -> None:
    row = {"name": "torch loop", "version": "", "state": "cut off", "note": "too long", "beyond_data_bytes": 3.2e9}
    sizes = {"ways": 10, "shots": 64, "queries": 256, "tasks": 1, "steps": 1000, "each_step": True}
    found = {
        "name": "bilevel-1000", "sizes": sizes, "cost": {"flops": 53e9}, "rates": {"matrix": 1e11, "copy": 1e10},
        "floors_s": {"flops": 0.53, "bytes": 0.1}, "rows": [row],
    }  # fmt: skip
    assert title(found).startswith(
        "bilevel-1000: 1 task, 10 classes, 64 new samples a step, 256 queries, 1000 inner steps"
    )
    machine = {
        "cpu": "a", "threads": 1, "instructions": "b", "device": "cpu", "torch": "1", "metafast": "1", "commit": "",
        "python": "3", "date": "2000-01-01",
    }  # fmt: skip
    text = markdown({"machine": machine, "workloads": [found]})
    assert "bilevel-1000: memory at the peak beyond samples and imports: torch loop 3,200 MB" in text
    del sizes["each_step"]
    assert "memory at the peak" not in markdown({"machine": machine, "workloads": [found]})
