"""The two plans: which steps run, in which order, and how many seconds each should take and may take.

A GPU may be available for minutes only, so both plans are tables of seconds. They were made before anything had run on
a GPU: durations are estimates from counts of launches, compilations and imports. The expected times of a plan leave 60
seconds of its limit.

``first`` checks whether results are right and how fast metafast is alone. The most important steps come first, so that
a run that is cut short still shows what to mend. ``second`` makes sense only after that: the long run of a paper, the
peers, the sanitizers. Two things are in no plan: workloads with many more tasks than the canonical ones, each of which
takes as long as five others, and torch.compile of convolutions, which takes minutes.
"""

from __future__ import annotations

from functools import partial

from .runner import Plan, Step
from .steps.correctness import precision, sanitize, smoke, tests
from .steps.environment import environment
from .steps.speed import counters, micro, peers, train
from .subjects import BLOCKS, TRITON

# Files of tests with an expression for pytest -k. _BLOCKS: a network with layer norm, by one thread block a task and by
# eight. _TRITON: Triton kernels with small tiles.
_BLOCKS = ("tests/test_gpu.py", "(float32 or one_launch) and (chosen or 8) and layer and not only and not rate")
_TRITON = ("tests/test_triton.py", "small")

# It takes 18 s if the extension comes with the pack; the limit is enough to build it.
_ENVIRONMENT = Step("env", 18, 80, environment, vital=True)

FIRST = Plan(
    "first", 260,
    (
        _ENVIRONMENT,
        # Each executor has a process of its own, because an illegal access spoils its process. Imports take 6 s, each
        # workload 2 s, one of them for timing.
        Step("smoke:blocks", 16, 35, partial(smoke, workloads=BLOCKS)),
        # This is the same, with 2 s for the first call of each workload, and 0.2 s for each of the 30 launchers in C
        # that Triton compiles.
        Step("smoke:triton", 38, 60, partial(smoke, workloads=TRITON)),
        # 14 processes run side by side; imports take 10 s. Without the pack's kernels each compiles for 40 s.
        Step("tests", 55, 90, tests),
        # These are 70,000 replays of 130 us, and the final test.
        Step("sinusoid", 20, 40, partial(train, recipe="sinusoid", backend="cuda")),
        # These are imports, and half a second for each launch that is measured.
        Step("ncu:blocks", 14, 25, partial(counters, executor="blocks")),
        Step("ncu:triton", 20, 40, partial(counters, executor="triton")),
        Step("micro", 18, 35, micro),
    ),
)  # fmt: skip


def _peers(workload: str, tasks: int, expected: float, limit: float) -> Step:
    """Makes a step that times the peers: the first calls run side by side, then all turns of a peer take 2 s
    together."""
    return Step(f"peers:{workload}", expected, limit, partial(peers, workload=workload, tasks=tasks))


def _sanitized(name: str, tests: tuple[str, str], expected: float, limit: float) -> Step:
    """Makes a step that runs tests under a sanitizer, where a test of 0.2 s takes seconds, after 8 s of imports."""
    tool, (files, chosen) = name.partition(":")[0], tests
    return Step(name, expected, limit, partial(sanitize, tool=tool, files=files, chosen=chosen))


SECOND = Plan(
    "second", 540,
    (
        _ENVIRONMENT,
        # These are reading the data, 60,000 replays of 1.45 ms, and the final test.
        Step("omniglot", 110, 180, partial(train, recipe="omniglot-5w1s", backend="triton", split="maml")),
        _peers("sin25-5", 25, 48, 75),
        _peers("sin1024-5", 1024, 42, 70),
        _peers("omni5w1s-1", 32, 38, 60),
        _peers("mini5w1s-5", 4, 38, 60),
        _peers("omni5w1s-5", 8, 42, 65),
        _sanitized("racecheck", _BLOCKS, 30, 50),
        _sanitized("memcheck:triton", _TRITON, 22, 40),
        _sanitized("synccheck", _BLOCKS, 18, 35),
        _sanitized("memcheck:blocks", _BLOCKS, 20, 35),
        Step("precision", 15, 30, partial(precision, workloads=("sin4096-5", "wide5w1s-5"))),
        _peers("torchbench-maml", 32, 38, 60),
    ),
)  # fmt: skip

PLANS = {plan.name: plan for plan in (FIRST, SECOND)}
