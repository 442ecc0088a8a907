"""Captures a user's nn.Module as a Program: it records one run and groups the operations into layers.

Operations for which there are rules become the layers that have them. The others become ``Derived`` layers, each of
which computes one value that somebody else reads. What is made of constants alone is computed where it is read, so that
a buffer may change between calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from metafast.kernels.contract.layer import Layer, Loss
from metafast.kernels.derived import Derived
from metafast.kernels.input_part import InputPart
from metafast.kernels.noise import Noise
from metafast.program import Node, Parameter, Program
from metafast.program.derive import Cone, Slot, Step, as_step
from metafast.program.noise import Draw
from metafast.program.operation import CaptureError, Constant, Input, Made, Operation, Recording, Ref, Weight
from metafast.program.patterns import Match, match
from metafast.program.recording import record

__all__ = ["CaptureError", "capture", "program_of"]


def capture(
    model: nn.Module, loss: Loss, x: Tensor, *, bn: str = "task", adapt: Iterable[str] | None = None, steps: int = 1
) -> Program:
    """Returns the Program of ``model`` under ``loss``, for one task's samples like ``x [n, ...]``.

    Args:
        model: takes one batch ``[n, ...]`` and returns one tensor. It runs once, and is as before when this returns.
        loss: a loss with rules, as ``metafast.program.losses.as_loss`` makes it.
        x: samples of one task.
        bn: the mode of every batch norm (see ``metafast.kernels.batch_norm``); ``per_step`` gives its parameters a
            leading axis of ``steps + 1`` rows.
        adapt: the names of the parameters that the inner loop moves; ``None`` means all of them.
        steps: the number S of inner steps; only ``per_step`` batch norm depends on it.

    Raises:
        CaptureError: the forward pass depends on values of the data, changes its input in place, or draws random
            numbers that cannot be repeated.
    """
    recording = record(model, x)
    names = used_parameters(recording, model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    modes = dict.fromkeys((name for name, _ in model.named_modules()), bn)
    adapted = set(names) if adapt is None else set(adapt)
    return program_of(model, recording, loss, Layout(names, shapes, adapted, steps), modes)


@dataclass(frozen=True)
class Layout:
    """Says which parameters a Program has.

    Attributes:
        names: their names, in the order of the flat vector.
        shapes: the shape of each in the module, by name.
        adapted: the names of those that the inner loop moves.
        steps: the number S of inner steps: those of ``per_step`` batch norm have ``S + 1`` rows.
    """

    names: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]]
    adapted: Collection[str]
    steps: int


def used_parameters(recording: Recording, model: nn.Module) -> list[str]:
    """Lists the names of the parameters that the output depends on, in the model's order."""
    used = {ref.name for ref in recording.behind([recording.output]) if isinstance(ref, Weight)}
    return [name for name, _ in model.named_parameters() if name in used]


def needed(recording: Recording) -> list[int]:
    """Lists the numbers of the operations that the output depends on, in their order."""
    return sorted({ref.operation for ref in recording.behind([recording.output]) if isinstance(ref, Made)})


def program_of(model: nn.Module, recording: Recording, loss: Loss, layout: Layout, modes: Mapping[str, str]) -> Program:
    """Groups the operations of ``recording`` into the nodes of a Program; ``modes`` has that of each batch norm.

    Raises:
        CaptureError: the output depends on no parameter, or on none that the inner loop moves.
    """
    builder = _Builder(recording, layout, modes)
    builder.run()
    return builder.finish(type(model).__name__, loss)


def node_values(recording: Recording, layout: Layout, modes: Mapping[str, str]) -> list[Made]:
    """Lists the recorded value that each node of ``program_of`` makes, in the order of the nodes."""
    builder = _Builder(recording, layout, modes)
    builder.run()
    return [ref for ref in builder.value if isinstance(ref, Made)]


class _Builder:
    """Turns a recording into the nodes of a Program.

    Attributes:
        needed: the numbers of the operations that the output depends on.
        traits: for each of them, whether it depends on the samples, and whether on an adapted parameter.
        matches: the layer that an operation becomes, for those that a pattern covers.
        roots: the values that nodes of the Program make, besides the matched ones.
        cone: for each operation without a pattern, the root of the one cone that it belongs to; ``None`` where each
            cone that reads it computes it again.
        value: the number of the Program's value, by reference.
        nodes: name, layer, inputs, names of the parameters, and constants of each node.
    """

    def __init__(self, recording: Recording, layout: Layout, modes: Mapping[str, str]) -> None:
        self.recording = recording
        self.operations = recording.operations
        self.layout = layout
        self.modes = modes
        self.needed = needed(recording)
        self.reads = {n: self.operations[n].reads for n in self.needed}
        self.data: dict[int, bool] = {}
        self.varying: dict[int, bool] = {}
        self.moving: dict[int, bool] = {}
        self.matches: dict[int, Match] = {}
        self.roots: set[Made] = set()
        self.cone: dict[int, Made | None] = {}
        self.value: dict[Ref, int] = {Input(0): 0}
        self.per_step: set[str] = set()
        self.nodes: list[tuple[str, Layer, tuple[int, ...], tuple[str, ...], tuple[Tensor, ...], str]] = []

    def run(self) -> None:
        """Finds layers, groups the rest, and makes the nodes."""
        for number in self.needed:
            self._examine(number)
        self._group()
        names = _Names()
        if self.recording.several:
            self._add_inputs()
        for number in self.needed:
            if number in self.matches:
                self._add_match(number, names)
                continue
            for part in range(self.operations[number].results):
                if Made(number, part) in self.roots:
                    self._add_cone(Made(number, part), names)

    def finish(self, model: str, loss: Loss) -> Program:
        """Makes the Program; parameters lie in the flat vector in the order of the layout."""
        if not self._is_value(self.recording.output):
            raise CaptureError(
                f"{model}.forward returns a tensor that does not depend on its input; the loss needs one that does"
            )
        offset, reached = 0, self.recording.reached()
        parameters = []
        for name in self.layout.names:
            shape = self.layout.shapes[name]
            if name in self.per_step:
                shape = (self.layout.steps + 1, *shape)
            parameters.append(Parameter(name, shape, offset, name in self.layout.adapted, name in reached))
            offset += parameters[-1].size
        if not parameters:
            raise CaptureError(f"{model} uses no parameters; there is nothing to meta-learn")
        if not self.layout.adapted:
            raise CaptureError(
                f"no parameter of {model} requires a gradient, so that the inner loop has none to move; call "
                "requires_grad_() on those that it may, or name them by adapt="
            )
        if not any(p.adapted for p in parameters):
            raise CaptureError(
                f"the forward pass of {model} uses none of the parameters to adapt, {sorted(self.layout.adapted)}; it "
                f"uses {list(self.layout.names)}"
            )
        index = {p.name: i for i, p in enumerate(parameters)}
        nodes = tuple(
            Node(name, layer, inputs, tuple(index[p] for p in params), constants, line)
            for name, layer, inputs, params, constants, line in self.nodes
        )
        return Program(nodes, tuple(parameters), self.value[self.recording.output], loss)

    def _examine(self, number: int) -> None:
        """Notes what an operation depends on, and the layer that it becomes, if any."""
        operation, reads = self.operations[number], self.reads[number]
        made = [ref for ref in reads if isinstance(ref, Made)]
        self.data[number] = any(isinstance(r, Input) for r in reads) or any(self.data[r.operation] for r in made)
        weights = [r for r in reads if isinstance(r, Weight)]
        self.varying[number] = self.data[number] or bool(weights) or any(self.varying[r.operation] for r in made)
        adapted = any(r.name in self.layout.adapted for r in weights)
        self.moving[number] = adapted or any(self.moving[r.operation] for r in made)
        if isinstance(operation.target, Draw):
            self.data[number] = self.varying[number] = self.moving[number] = True
            self.matches[number] = self._noise(operation.target.noise, reads)
            self.reads[number] = list(self.matches[number].inputs)
            return
        found = match(operation, self._shape, self._is_value, self.modes.get(operation.path) or self._mode(operation))
        if found is not None:
            self.matches[number] = found

    def _noise(self, noise: Noise, reads: Sequence[Ref]) -> Match:
        """Returns the layer that draws; it takes its shape from the value that it has it from, if there is one."""
        if any(self._is_value(ref) for ref in reads):
            return Match(replace(noise, shape=None), reads)
        return Match(noise, ())

    @staticmethod
    def _mode(operation: Operation) -> str:
        """Returns the mode of a batch norm that no module of that class makes, by its own argument."""
        return "task" if operation.arguments().get("training", True) else "frozen"

    def _shape(self, ref: Ref) -> tuple[int, ...]:
        if isinstance(ref, Made):
            return tuple(self.recording.values[ref][0])
        return tuple(self.recording.inputs[ref.number]) if isinstance(ref, Input) else ()

    def _is_value(self, ref: Ref) -> bool:
        """Says whether ``ref`` is a value of the batch that has real numbers."""
        if isinstance(ref, Input):
            return self.recording.dtypes[ref.number].is_floating_point
        return isinstance(ref, Made) and self.data[ref.operation] and self._is_real(ref)

    def _is_real(self, ref: Made) -> bool:
        return self.recording.values[ref][1].is_floating_point

    def _group(self) -> None:
        """Decides, from the last operation to the first, which ones belong to one cone."""
        readers: dict[int, list[tuple[Made, int | None]]] = {n: [] for n in self.needed}
        for number in self.needed:
            for ref in self.reads[number]:
                if isinstance(ref, Made):
                    readers[ref.operation].append((ref, number))
        if isinstance(self.recording.output, Made):
            readers[self.recording.output.operation].append((self.recording.output, None))
        for number in reversed(self.needed):
            if number not in self.matches and self.varying[number]:
                self._place(number, readers[number])

    def _place(self, number: int, readers: list[tuple[Made, int | None]]) -> None:
        """Puts an operation into the cone of its readers, or makes its results roots of cones of their own.

        An operation whose results are no real numbers, such as indices, is computed again in each cone that reads it.
        A cone does not mix what the inner loop changes with what it leaves: that is computed once.
        """
        cones = {None if r is None or r in self.matches else self.cone[r] for _, r in readers}
        only = next(iter(cones)) if len(cones) == 1 else None
        if only is not None and self.moving[number] == self.moving[only.operation]:
            self.cone[number] = only
            return
        real = all(self._is_real(ref) for ref, _ in readers)
        roots = {ref for ref, r in readers if real or (self._is_real(ref) and (r is None or r in self.matches))}
        self.roots |= roots
        self.cone[number] = next(iter(roots)) if real and len(roots) == 1 else None

    def _add_inputs(self) -> None:
        """Makes a node of each part of the samples that somebody reads."""
        used = {ref for reads in self.reads.values() for ref in reads if isinstance(ref, Input)}
        del self.value[Input(0)]
        for ref in sorted(used, key=lambda ref: ref.number):
            self.nodes.append((f"input_{ref.number}", InputPart(ref.number), (0,), (), (), ""))
            self.value[ref] = len(self.nodes)

    def _add_match(self, number: int, names: _Names) -> None:
        """Makes the node of a layer with rules."""
        found, operation = self.matches[number], self.operations[number]
        if found.layer.varies:
            self.per_step.update(found.params)
        inputs = tuple(self.value[ref] for ref in found.inputs)
        name = names.of(operation, [operation])
        self.nodes.append((name, found.layer, inputs, tuple(found.params), tuple(found.constants), operation.line))
        self.value[Made(number)] = len(self.nodes)

    def _add_cone(self, root: Made, names: _Names) -> None:
        """Makes the node of a derived layer, which computes ``root``."""
        inside = [ref for ref in self.recording.behind([root], partial(self._belongs, root)) if isinstance(ref, Made)]
        order = sorted({ref.operation for ref in inside if self._belongs(root, ref)})
        slots: dict[Ref, Slot] = {Made(n, part): Slot("made", i, part) for i, n in enumerate(order)
                                  for part in range(self.operations[n].results)}  # fmt: skip
        outside: dict[str, list[Any]] = {"input": [], "parameter": [], "constant": []}
        for ref in dict.fromkeys(ref for n in order for ref in self.reads[n] if ref not in slots):
            kind = {Weight: "parameter", Constant: "constant"}.get(type(ref), "input")
            slots[ref] = Slot(kind, len(outside[kind]))
            outside[kind].append(ref)
        steps: tuple[Step, ...] = tuple(as_step(self.operations[n], slots) for n in order)
        cone = Cone(steps, slots[root])
        operations = [self.operations[n] for n in order]
        layer = Derived(cone, _label(operations), cone.reverse_only)
        inputs = tuple(self.value[ref] for ref in outside["input"])
        params = tuple(ref.name for ref in outside["parameter"])
        constants = tuple(ref.tensor for ref in outside["constant"])
        name = names.of(operations[-1], operations)
        self.nodes.append((name, layer, inputs, params, constants, operations[-1].line))
        self.value[root] = len(self.nodes)

    def _belongs(self, root: Made, ref: Made) -> bool:
        """Says whether the cone of ``root`` computes ``ref`` itself, rather than to be given it."""
        if ref == root or not self.varying[ref.operation]:
            return True
        return ref.operation not in self.matches and ref not in self.roots


class _Names:
    """Gives each node a name of its own: that of its module, or that of its operation."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}

    def of(self, operation: Operation, operations: Sequence[Operation]) -> str:
        """Returns a name for the node of ``operations``, of which ``operation`` is the last."""
        inside = bool(operation.path) and all(o.path == operation.path for o in operations)
        name = operation.path if inside and operation.leaf else operation.name
        if isinstance(operation.target, Draw):
            name = f"{operation.path}.noise" if operation.path else "noise"
        count = self.taken.get(name, 0)
        self.taken[name] = count + 1
        return name if count == 0 else f"{name}_{count}"


def _label(operations: Sequence[Operation]) -> str:
    """Returns words for the operations of one node: the class of their module, or their own names."""
    if operations[0].leaf and len({operation.path for operation in operations}) == 1:
        return operations[0].leaf
    names = list(dict.fromkeys(operation.name for operation in operations))
    return ", ".join(names) if len(names) < 4 else f"{names[0]} .. {names[-1]}, {len(operations)} operations"
