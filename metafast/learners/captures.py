"""Holds the Programs of one module, each captured when the first batch of its kind comes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from metafast.kernels.contract.layer import Loss
from metafast.learners.batch_norm import BatchNormMode, in_modes, modes_of, norms_of, statistics_of
from metafast.learners.module_snapshot import Moment
from metafast.program import Program
from metafast.program.capture import CaptureError, Layout, program_of, used_parameters
from metafast.program.operation import Recording
from metafast.program.recording import record
from metafast.tasks import TaskBatch, each_part, parts_of

_KINDS = 64
"""How many kinds of batches are remembered; older ones are captured again when they come back."""
_SEEN = ("recordings", "programs", "alike", "doubted", "_guards")
"""What a copy of captures does not take over."""


@dataclass(frozen=True)
class CaptureSettings:
    """Says how a module is captured.

    Attributes:
        loss: the loss of the Programs.
        query_loss: that of the query sets, where it is another one.
        adapt: the names of the parameters that the inner loop moves.
        bn: the modes of batch norm.
        steps: the number S of inner steps.
        output: which part counts of what the module returns; ``None``: all of it.
    """

    loss: Loss
    query_loss: Loss | None
    adapt: Collection[str]
    bn: BatchNormMode
    steps: int
    output: str | int | None = None


@dataclass
class Captures:
    """Captures ``model`` for each kind of samples.

    Under other settings, or when the module has changed, there are new ``Captures``. A copy has captured nothing yet.

    Attributes:
        model: the module.
        settings: how it is captured.
        trained: whether each batch norm was in training when the learner last was, by name: a learner in evaluation
            keeps to that.
        second_look: whether each Program is compared with the module; what compares more does without.
        recordings: what has been recorded of this module, by the kind of samples.
        programs: the Programs made of them.
        alike: for kinds of samples of which there are many, how many of them show what the module does with all.
        doubted: the kinds that are recorded themselves, because others were not like them.
    """

    model: nn.Module
    settings: CaptureSettings
    trained: dict[str, bool] = field(default_factory=dict)
    second_look: bool = True
    recordings: OrderedDict[Any, Recording] = field(default_factory=OrderedDict)
    programs: dict[Any, Program] = field(default_factory=dict)
    alike: dict[Any, int] = field(default_factory=dict)
    doubted: set[Any] = field(default_factory=set)
    _guards: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, tasks: TaskBatch) -> Program:
        """Returns the Program for batches like ``tasks``.

        Raises:
            CaptureError: the module cannot become a Program.
        """
        support = self.recording(tasks.support_x)
        self._spare(tasks.query_x, tasks.support_x)
        query = self.recording(tasks.query_x)
        names = self._names(support, query)
        first = self._program(support, names, tasks.support_x)
        second = self._program(query, names, tasks.query_x)
        if first is second:
            return first
        return replace(first, by_samples={_samples(tasks.support_x): first, _samples(tasks.query_x): second})

    def is_spared(self, x: Any) -> bool:
        """Says whether the module has not run on as many samples as ``x`` has, because fewer showed what it does."""
        return _kind(x) in self.alike

    def shown(self, x: Any) -> Any:
        """Returns as many samples of ``x`` as the module runs on to show what it does with all of them."""
        few = self.alike.get(_kind(x))
        return x if few is None else _first_samples(x, few)

    def doubt(self, x: Any) -> bool:
        """Has the module run on samples like ``x`` themselves, the next time; it says whether that is news."""
        self.doubted.add(_kind(x))
        self.programs = {key: program for key, program in self.programs.items() if key[0] != _kind(x)}
        return self.alike.pop(_kind(x), None) is not None

    def _spare(self, query: Any, support: Any) -> None:
        """Lets few query samples stand for many where the module does the same with two numbers of samples.

        A run takes as long as a forward pass, and query sets may be large. The second look sees whether they differ.
        """
        few, kind = _samples(support) + 1, _kind(query)
        if not self.second_look or _samples(query) <= few or kind in self.recordings or kind in self.doubted:
            return
        if self._does_the_same(support, _first_samples(query, few)):
            self.alike[kind] = few

    def _does_the_same(self, x: Any, other: Any) -> bool:
        """Says whether the module does the same with samples like ``x`` as with ``other``, of another number."""
        one = self.recording(x)
        try:
            two = self.recording(other)
        except (CaptureError, ValueError):  # such as an even number of samples that it asks for
            return False
        names = self._names(one, two)
        return self._program(one, names, x) is self._program(two, names, other)

    def dependence_on_size(self, tasks: TaskBatch) -> str | None:
        """Says in words where what the module computes of a sample depends on how many there are, or ``None``."""
        for name, x in (("support_x", tasks.support_x), ("query_x", tasks.query_x)):
            n = _samples(x)
            if n > 1 and not self._does_the_same(x, _first_samples(x, n - 1)):
                return (
                    f"what {type(self.model).__name__} computes of a sample of {name} depends on how many there are: "
                    f"{n - 1} give something else than {n}. Use tasks of one size with this model"
                )
        return None

    def of_samples(self, x: Any) -> Program:
        """Returns the Program for support and query samples that are both like ``x [T, n, ...]``."""
        found = self.recording(x)
        return self._program(found, self._names(found), x)

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """Lets the model be called without a graph; running statistics stay where ``bn`` says what becomes of them."""
        given = self.settings.bn is not None
        with torch.no_grad(), in_modes(self.model, dict.fromkeys(norms_of(self.model), "frozen") if given else {}):
            yield

    def extended(self, program: Program, x: Any, made_at: Moment | None = None) -> Program:
        """Returns ``program``, or where it depends on the number of samples the one for that of ``x``.

        ``made_at`` is when ``program`` was made, if the model may have changed since.

        Raises:
            RuntimeError: the model has changed since, and would have to run again.
        """
        samples = _samples(x)
        if samples in program.by_samples:
            return program
        gone = made_at is not None and (made_at.gone() or self.stale())
        if not gone or _kind(self.shown(x)) in self.recordings:
            names = tuple(p.name for p in program.parameters)
            made = self._program(self.recording(x), names, x)
            if not program.by_samples and made.computes_as(program.held_from or program):
                return program
            if not gone and (made_at is None or not made_at.moved()):
                return replace(made.with_loss(program.loss), by_samples={})
        raise RuntimeError(
            f"{type(self.model).__name__} has changed since it was adapted, and was not run on {samples} samples of a "
            "task before. Predict on so many before the model changes, or adapt again"
        )

    def recording(self, x: Any) -> Recording:
        """Returns what the module does with samples like ``x [T, n, ...]``: it runs once on those of the first task."""
        x = self.shown(x)
        key = _kind(x)
        found = self.recordings.get(key)
        if found is None:
            ignored = statistics_of(self.model) if self.settings.bn is not None else []
            with in_modes(self.model, self.modes()):
                found = record(self.model, first_task(x), self.settings.output, ignored)
            self.recordings[key] = found
            while len(self.recordings) > _KINDS:
                self.recordings.popitem(last=False)
            self._guards |= {id(tensor): (tensor, tensor.detach().clone()) for tensor in found.guards}
        return found

    def output_shape(self, x: Any) -> tuple[int, ...]:
        """Returns the shape of a sample's output.

        Raises:
            ValueError: the first axis of the outputs is not that of the samples.
        """
        recording = self.recording(x)
        shape = recording.output_shape
        if shape[:1] != recording.inputs[0][:1]:
            given = ", ".join(str(list(part.shape[1:])) for part in parts_of(x))
            raise ValueError(
                f"for samples [n, ...] = {given} the model gives {list(shape)}; its first axis must stay the sample "
                "axis n"
            )
        return tuple(shape[1:])

    def modes(self) -> dict[str, str]:
        """Returns the mode of each batch norm by name."""
        return modes_of(self.model, self.settings.bn, self.trained)

    def stale(self) -> bool:
        """Says whether a number has changed that some recording has read of a buffer."""
        return bool(self._guards) and not all(torch.equal(*pair) for pair in self._guards.values())

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what has been seen."""
        return {**self.__dict__, **{name: type(getattr(self, name))() for name in _SEEN}}

    def _names(self, *recordings: Recording) -> tuple[str, ...]:
        """Lists the parameters that any of the recordings uses, in the model's order."""
        used = {name for recording in recordings for name in used_parameters(recording, self.model)}
        return tuple(name for name, _ in self.model.named_parameters() if name in used)

    def _program(self, recording: Recording, names: tuple[str, ...], x: Any) -> Program:
        """Returns the Program of a recording; where another one computes the same, that one."""
        key = (_kind(x), names)
        if key not in self.programs:
            settings = self.settings
            shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
            layout = Layout(names, shapes, settings.adapt, settings.steps)
            made = program_of(self.model, recording, settings.loss, layout, self.modes())
            made = made.with_loss(settings.loss, settings.query_loss)
            same = [p for p in self.programs.values() if p.computes_as(made)]
            self.programs[key] = same[0] if same else made
            if len(self.programs) > 4 * _KINDS:
                self.programs.pop(next(iter(self.programs)))
        return self.programs[key]


def _kind(x: Any) -> tuple[Any, ...]:
    """Returns all that a recording depends on besides the module: the shapes of one task's samples, and dtypes."""
    leaves, structure = tree_flatten(x)
    return str(structure), *((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves)


def has_own_derivatives(program: Program) -> bool:
    """Says whether some node calls a ``torch.autograd.Function``, whose gradient is what its author wrote."""
    return any(getattr(getattr(n.layer, "function", None), "calls_functions", False) for n in program.derived)


def first_task(x: Any) -> Any:
    """Returns the samples of the first task."""
    return tree_map(lambda leaf: leaf[0], x)


def _first_samples(x: Any, count: int) -> Any:
    """Returns the first samples of each task."""
    return each_part(lambda part: part[:, :count], x)


def _samples(x: Any) -> int:
    """Returns how many samples each task has."""
    return int(tree_flatten(x)[0][0].shape[1])
