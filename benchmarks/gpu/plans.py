"""The two plans: what runs, in which order, how long it should take and may take.

A GPU may be at hand for minutes only, so both plans are tables of seconds, made before anything had run on one:
durations are estimates from counts of launches, compilations and imports. What each plan is expected to take leaves 60
seconds of its limit. ``first`` asks whether it is right and how fast it is alone, in order of what would be missed
most; then there is a result to mend by, whatever happens. ``second`` is what only then has a meaning: the long run of
a paper, the peers, the sanitizers. What is left out of them: workloads with many more tasks than the canonical ones
(each takes as long as five others), and torch.compile of convolutions (minutes).
"""

from __future__ import annotations

from functools import partial

from .runner import Plan, Step
from .steps.correctness import precision, sanitize, smoke, tests
from .steps.environment import environment
from .steps.speed import counters, micro, peers, train
from .subjects import BLOCKS, TRITON

# Files and tests: a network with layer norm, one block a task and eight; Triton kernels with small tiles.
_BLOCKS = ("tests/test_gpu.py", "(float32 or one_launch) and (chosen or 8) and layer and not only and not rate")
_TRITON = ("tests/test_triton.py", "small")

# 18 s where the extension comes with the pack; the limit is a build of it.
_ENVIRONMENT = Step("env", 18, 80, environment, vital=True)

FIRST = Plan(
    "first", 260,
    (
        _ENVIRONMENT,
        # One process an executor, for an illegal access spoils its process. 6 s of imports, then 2 s a workload, a
        # second of it timing.
        Step("smoke:blocks", 16, 35, partial(smoke, workloads=BLOCKS)),
        # The same, with 2 s for the first call of each, and 0.2 s for each of 30 launchers that Triton compiles in C.
        Step("smoke:triton", 38, 60, partial(smoke, workloads=TRITON)),
        # 14 processes, 10 s of imports; without the pack's kernels there are 40 s of compilations in each.
        Step("tests", 55, 90, tests),
        # 70,000 replays of 130 us, and the final test.
        Step("sinusoid", 20, 40, partial(train, recipe="sinusoid", backend="cuda")),
        # Imports, and half a second for each launch that is looked at.
        Step("ncu:blocks", 14, 25, partial(counters, executor="blocks")),
        Step("ncu:triton", 20, 40, partial(counters, executor="triton")),
        Step("micro", 18, 35, micro),
    ),
)  # fmt: skip


def _compared(workload: str, tasks: int, expected: float, limit: float) -> Step:
    """First calls side by side take as long as the slowest, then each peer has its turns of 2 s together."""
    return Step(f"peers:{workload}", expected, limit, partial(peers, workload=workload, tasks=tasks))


def _watched(name: str, tests: tuple[str, str], expected: float, limit: float) -> Step:
    """A test of 0.2 s takes seconds under a sanitizer, after 8 s of imports."""
    tool, (files, chosen) = name.partition(":")[0], tests
    return Step(name, expected, limit, partial(sanitize, tool=tool, files=files, chosen=chosen))


SECOND = Plan(
    "second", 540,
    (
        _ENVIRONMENT,
        # 60,000 replays of 1.45 ms, reading the data, and the final test.
        Step("omniglot", 110, 180, partial(train, recipe="omniglot-5w1s", backend="triton", split="maml")),
        _compared("sin25-5", 25, 48, 75),
        _compared("sin1024-5", 1024, 42, 70),
        _compared("omni5w1s-1", 32, 38, 60),
        _compared("mini5w1s-5", 4, 38, 60),
        _compared("omni5w1s-5", 8, 42, 65),
        _watched("racecheck", _BLOCKS, 30, 50),
        _watched("memcheck:triton", _TRITON, 22, 40),
        _watched("synccheck", _BLOCKS, 18, 35),
        _watched("memcheck:blocks", _BLOCKS, 20, 35),
        Step("precision", 15, 30, partial(precision, workloads=("sin4096-5", "wide5w1s-5"))),
        _compared("torchbench-maml", 32, 38, 60),
    ),
)  # fmt: skip

PLANS = {plan.name: plan for plan in (FIRST, SECOND)}
