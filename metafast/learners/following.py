"""Follows what the user changes of a module after a learner has seen it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor

from metafast.learners.batch_norm import norms_of
from metafast.learners.captures import Captures, CaptureSettings
from metafast.learners.images import image_of
from metafast.learners.known_batch import KnownBatch
from metafast.learners.layout import named_rows
from metafast.learners.module_snapshot import ModuleSnapshot
from metafast.learners.settings import SettledLearner
from metafast.program import Program

_MADE_AGAIN = ("_known", "_latest", "_snapshot", "_model_snapshot", "_fixed_rate", "_assigned", "_left")
"""What a copy of a learner does not take over."""


class FollowingLearner(SettledLearner):
    """Remembers what it has found out of the batches that it has seen, for as long as its module is what it was."""

    def train(self, mode: bool = True) -> Any:
        """Does what any module's does; in evaluation each batch norm goes on as it last was in training."""
        ends = self.training and not mode and self._sealed
        if ends and {name: norm.training for name, norm in norms_of(self.model).items()} != self.captures.trained:
            self._capture_again()
        return super().train(mode)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does what any module's does, without its walk through all modules where none has changed."""
        if set_to_none and not self._snapshot.parts_changed():
            for parameter in self._snapshot.parameters:
                parameter.grad = None
        else:
            super().zero_grad(set_to_none)

    def parameters_of(self, program: Program) -> list[Tensor]:
        """Lists the meta-parameters of the model in the order of ``program``."""
        named = {**dict(self.model.named_parameters()), **named_rows(self.rows)}
        return [named[p.name] for p in program.parameters]

    def _new_captures(self, trained: dict[str, bool], second_look: bool = True) -> Captures:
        losses = self.loss, self.query_loss
        settings = CaptureSettings(*losses, self.adapted_names, self._bn, self.steps, self.output)
        return Captures(self.model, settings, trained, second_look)

    def _start(self) -> None:
        """Makes what a learner remembers of batches, of which it has seen none."""
        self._known: OrderedDict[tuple[object, ...], KnownBatch] = OrderedDict()
        self._latest: KnownBatch | None = None
        self._swapped = False
        self._look()

    def _plan_again(self) -> None:
        if self._sealed:
            self._follow_changes()
            self._start()

    def _capture_again(self) -> None:
        if self._sealed:
            trained = self.captures.trained
            if self.training:
                trained = {name: norm.training for name, norm in norms_of(self.model).items()}
            self.__dict__["captures"] = self._new_captures(trained, self.captures.second_look)
            self._start()

    def _follow_changes(self) -> None:
        """Forgets what was captured where the module is not as it was; it is captured again with the next batch."""
        stale = self.captures.stale() or (bool(self._left) and self._left != self._attributes_left())
        if not stale and not self._snapshot.changed():
            if self._swapped:
                self._refresh_sources(swapped=False)
            return
        if not stale and self._snapshot.only_values_changed():
            self._refresh_sources(swapped=True)
            return
        if not stale and self.captures.model is self.model and not self._model_snapshot.changed():
            self._start()  # rates or rows are others
        else:
            self._capture_again()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is made again: a copy has seen no batch, and lists its parts itself."""
        state = {name: value for name, value in self.__dict__.items() if name not in _MADE_AGAIN}
        return {**state, **{name: dict(state[name]) for name in ("_modules", "_parameters", "_buffers")}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._capture_again()

    def _look(self) -> None:
        """Takes note of how the module is now."""
        assigned = {pair for recording in self.captures.recordings.values() for pair in recording.assigned}
        self.__dict__["_fixed_rate"] = self.rate.fixed  # else nn.Module would take it for a parameter of its own
        self._model_snapshot = ModuleSnapshot(self.model, ignored=assigned)
        self._snapshot = ModuleSnapshot(self, owner=self, ignored=assigned)
        homes = {id(module.__dict__): module.__dict__ for module in self.model.modules()}
        self._assigned = [(homes[home], name) for home, name in assigned if home in homes]
        self._left = self._attributes_left()

    def _attributes_left(self) -> list[Any]:
        """Returns images of the attributes that a call of the model sets, as the last call left them."""
        return [image_of(home.get(name)) for home, name in self._assigned]

    def _refresh_sources(self, swapped: bool) -> None:
        """Looks up the parameters again: where they are ``swapped``, others stand in their places for a while."""
        self._swapped, self.__dict__["_fixed_rate"] = swapped, self.rate.fixed
        for known in self._known.values():
            known.parameters[:] = self.parameters_of(known.program)

    def _note_traces(self) -> None:
        """Takes note of what a call has just left in attributes; what there was nothing of before is a change."""
        unset, now = image_of(None), self._attributes_left()
        self._left = [was if was == unset else left for was, left in zip(self._left, now, strict=True)]
