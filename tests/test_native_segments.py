"""Long loops in one C++ call: which steps are kept, how much memory that takes, and that it changes no bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from native_work import RULES, assert_same, kept, plain, work
from torch import nn

import metafast as mf
from metafast.executors import CpuExecutor

pytestmark = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")  # in such a build no two things share memory


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("each_step", [False, True])
@pytest.mark.parametrize("name", ["momentum", "both clips", "adam, clips", "rmsprop, all", None])
def test_segments_change_no_bit(name, each_step):
    for weights in ((*[0.0] * 30, 1.0), (0.1, *[0.0] * 10, 0.4, *[0.02] * 19)):
        made = work(RULES.get(name), "mlp", "step", 30, 3, each_step=each_step, weights=weights)
        made = plain(made) if name is None else made
        for change in ({}, {"first_order": True}, {"learns_rates": False}, {"truncate": 23}):
            one = made.but(**change)
            whole, least = one.meta_gradient(), kept(one)
            assert CpuExecutor()._memory(one.program, one.tasks.shapes, one.loop)["segment"] >= 23
            keeps_tapes = set()
            for times in (1, 3, 6, 8, 10):
                bounded = one.but(memory=times * least)
                numbers = CpuExecutor()._memory(one.program, one.tasks.shapes, bounded.loop)
                assert times > 1 or numbers["segment"] < 23
                keeps_tapes.add(bool(numbers["keeps_tapes"]) and numbers["segment"] < 23)
                assert_same(bounded.meta_gradient(), whole)
            assert keeps_tapes == {False} if one.loop.first_order else {False, True}
            with pytest.raises(ValueError, match="keeps"):
                one.but(memory=least - 1).meta_gradient()
    torch.set_num_threads(2)
    assert_same(bounded.but(memory=2 * least).meta_gradient(), whole)


def test_every_length_of_segments():
    for steps_ in (1, 2, 3, 5, 12, 17):
        made = work(RULES["adam"], "mlp", "step", steps_, 1, each_step=True)
        whole = made.meta_gradient()
        lengths = set()
        least = kept(made) if steps_ > 1 else 0
        for memory in range(least, 40 * least, max(least // 5, 1)):
            bounded = made.but(memory=memory)
            lengths.add(CpuExecutor()._memory(made.program, made.tasks.shapes, bounded.loop)["segment"])
            assert_same(bounded.meta_gradient(), whole)
        assert steps_ < 12 or len(lengths) > 1


def test_the_words_on_memory():
    made = work(None, mlp_of_1000(), steps=1000, tasks=1, support=64, dtype=torch.float32, learns_rates=False)
    plan = CpuExecutor().memory(made.program, made.loop, made.tasks.shapes)
    said = re.search(r"(\d+) steps kept at a time, (\d+) of 1000 taken again, which costs a gradient each", str(plan))
    kept, again = map(int, said.groups())
    assert kept + again == 1000
    assert plan.keep
    assert kept >= (200 if SANITIZED else 600)
    assert plan.peak < (110 if SANITIZED else 94) * 4 * made.program.size
    each = made.loop._replace(learns_rates=True, one_rate=False)
    learned = CpuExecutor()._memory(made.program, made.tasks.shapes, each)
    assert learned["segment"] < CpuExecutor()._memory(made.program, made.tasks.shapes, made.loop)["segment"]
    cut = made.but(truncate=5).loop
    assert "the way back through 5 of 1000 steps" in str(CpuExecutor().memory(made.program, cut, made.tasks.shapes))
    with pytest.raises(ValueError, match="memory=1000: the way back through 1000 steps keeps"):
        CpuExecutor().memory(made.program, made.loop._replace(memory=1000), made.tasks.shapes)


def mlp_of_1000():
    return lambda: nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)), (784,)


LONG = """
import torch
from native_work import work
from test_native_segments import mlp_of_1000

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
small = work(None, mlp_of_1000(), steps=2, tasks=1, support=64, dtype=torch.float32, learns_rates=False)
small.meta_gradient()
made = small.but(steps=1000, step_weights=(*[0.0] * 1000, 1.0))
before = peak()
made.meta_gradient()
print((peak() - before) * 1024 / (4 * made.program.size))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux says how much memory was in use")
def test_a_thousand_steps_take_the_memory_of_94():
    """Copies of the parameters, by what the operating system counts."""
    here = os.path.dirname(__file__)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", LONG], check=True, capture_output=True, timeout=300, env=env, cwd=here)
    assert 30 < float(run.stdout) < 94


def test_explain_says_what_runs_within_little_memory():
    """One call fits where the same taken by parts does not; tasks that no longer run in lanes are not said to."""
    x = torch.randn(64, 5, 3)
    model = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2))
    learner = mf.MAML(model, loss="mse", lr=0.1, steps=20, backend="cpu", memory=1 << 14)
    learner.backward(mf.TaskBatch(x, x[..., :2], x, x[..., :2]))
    said = learner.explain()
    assert "taken again, which costs a gradient each" in said
    assert "memory=16,384: the way back through 20 steps keeps 619,520 bytes at the least" in said
    assert "tasks at once" not in said
    learner.memory = None
    learner.backward(mf.TaskBatch(x, x[..., :2], x, x[..., :2]))
    assert "tasks at once" in learner.explain()
