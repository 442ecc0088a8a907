"""Holds what a learner knows of a kind of batches."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metafast.executors import Choice
from metafast.program import Program


class KnownBatch(NamedTuple):
    """Holds what is known of one kind of batch since the first of it was seen.

    ``parameters`` are those of the model in the order of ``program``. ``output`` is the shape of a sample's output;
    ``checks_targets`` says whether the values of the targets are looked at in every batch, ``leaves_traces`` whether a
    call of the model changes its buffers or attributes, ``tracks_statistics`` whether there is a ``"running"`` norm.
    ``is_recorded`` says that autograd records the inner loop, because a ``torch.autograd.Function`` of the model has a
    derivative that only autograd can differentiate. ``unpaddable`` says why samples may be no padding, where the kind
    has masks and the model is one for which that is so. ``tasks`` is the number of tasks.
    """

    program: Program
    parameters: list[Tensor]
    is_recorded: bool
    leaves_traces: bool
    tracks_statistics: bool
    choice: Choice
    output: tuple[int, ...]
    checks_targets: bool
    unpaddable: str | None
    tasks: int
