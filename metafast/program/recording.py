"""Records what a module computes: it runs once on the samples of one task, and each operation is noted on its way.

It is the module itself that runs, on real tensors: hooks, subclasses, parametrizations, scripted and compiled parts and
Python on shapes all do what they do. Operations are seen at torch's PreDispatch key, above autograd and autocast, where
``linear``, ``conv2d`` and ``batch_norm`` are still whole; this is where torch.export records as well. Changes in place
become new values (:mod:`metafast.program.aliases`).
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from metafast.program.interception import OtherCoins, coins_refused, other_random_states
from metafast.program.module_run import call, picked, unchanged
from metafast.program.operation import Recording
from metafast.program.recorder import Recorder
from metafast.program.user_lines import line_behind
from metafast.tasks import Samples

_ONE_AT_A_TIME = threading.RLock()
"""A recording stands in for torch's own ``Function.apply``, which all threads share."""


def record(model: nn.Module, x: Any, part: str | int | None = None, ignored: Collection[Tensor] = ()) -> Recording:
    """Runs ``model(x)`` once and returns what it did.

    Args:
        model: the module; its buffers, attributes and gradients are as before when the call returns.
        x: one task's samples: a tensor ``[n, ...]``, or ``Samples`` of such.
        part: the name or number of the part that counts of what the module returns; ``None``: all of it.
        ignored: buffers that may change without being counted as a change of the module.

    Raises:
        ValueError: the module fails on these samples.
        CaptureError: the run cannot be told from one task to the next: it depends on values of the data, draws random
            numbers that cannot be repeated, or changes what it may not change. The text names the line and the remedy.
    """
    run = partial(_record, model, x, part, ignored)
    with _ONE_AT_A_TIME:
        try:
            return run()
        except OtherCoins:
            # What is imported on the way, as torch's own parts are, may toss coins too, but only once.
            return line_behind(run, other_random_states, coins_refused)


def _record(model: nn.Module, x: Any, part: str | int | None, ignored: Collection[Tensor]) -> Recording:
    """Runs the module once."""
    leaves, structure = tree_flatten(x)
    recorder = Recorder(model, [leaf.detach().clone() for leaf in leaves])
    recorder.recording.several = isinstance(x, Samples)
    recording = recorder.recording
    try:
        with unchanged(model, ignored) as state:
            with recorder.watching():
                returned = call(model, tree_unflatten(recorder.inputs, structure))
                recorder.finish(picked(returned, part, model))
            state.check_parameters()
            recording.changes_module = state.changed()
            recording.assigned = state.assigned(recording.constants())
    finally:
        recorder.release()
    return recording
