"""Writes a Program in the form that C++ reads, for the native executors on the CPU and on a GPU alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from metafast.executors.base import losses_with_targets
from metafast.executors.by_program import ByProgram
from metafast.kernels.contract.layer import Loss
from metafast.program import Node, Program
from metafast.tasks import Batch, TaskShapes

try:
    import metafast._C as extension

    extension_error = None
    # Its arguments may belong to autograd's graph; its results do not, and so autograd passes the call through.
    _library = torch.library.Library("metafast", "IMPL")
    _library.impl("cpu_meta_gradient", torch.library.fallthrough_kernel, "Autograd")
except ImportError as error:  # metafast works without it; `metafast doctor` says what that costs
    extension = None
    extension_error = f"metafast._C is not installed ({error}); build it with: pip install --no-build-isolation -e ."

if extension is not None and not hasattr(extension, "facts"):
    extension = None
    extension_error = "metafast._C is older than the rest; build it with: pip install --no-build-isolation -e ."

FACTS: dict[str, Any] = {"kinds": {}, "losses": {}, "steps": {}} if extension is None else json.loads(extension.facts)
"""What the extension says of itself (csrc/torch/facts.h): names, numbers and layouts of which Python keeps no copy."""
LOSSES = tuple(name for name, loss in FACTS["losses"].items() if loss["reads"] != "gradient")
"""The losses that have rules in C++. Python computes any other and hands C++ its gradient in the outputs."""
_LABELLED = {name for name, loss in FACTS["losses"].items() if loss["reads"] == "labels"}
LEFT_OUT = -100
"""The label that PyTorch's cross-entropy leaves out if nothing else is said; C++ knows of none."""
_ALL = torch.empty(0, dtype=torch.int64)


class Model:
    """Holds a Program in the form that C++ reads, for samples of one shape.

    Every layer must have rules in C++: ``unsupported_layer`` returns ``None``.

    Attributes:
        description: the numbers that describe the Program, float64 ``[length]``, as csrc/core/plan/description.h reads
            them.
        constants: the constants of all nodes, one after another.
        rank: the number of axes of one sample's outputs.
    """

    def __init__(self, program: Program, sample: tuple[int, ...], external_loss: bool = False) -> None:
        self.description = _describe(program, sample, external_loss)
        self.constants = tuple(c for node in program.nodes for c in node.constants)
        self.rank = _ranks(program, len(sample))[program.output]

    def shaped(self, outputs: Tensor) -> Tensor:
        """Gives outputs ``[T, n, c, h, w]`` the shape that they have in the model, with ``rank`` axes for a sample."""
        return outputs if self.rank == 3 else outputs.flatten(2)


SomeModel = TypeVar("SomeModel", bound=Model)


class Models(Generic[SomeModel]):
    """Keeps the models that an executor has seen, for as long as their Programs live."""

    def __init__(self, make: Callable[[Program, tuple[int, ...]], SomeModel]) -> None:
        self._make = make
        self._kept: ByProgram[SomeModel] = ByProgram()

    def of(self, program: Program, sample: tuple[int, ...]) -> SomeModel:
        """Returns the model of ``program`` for samples of the shape ``sample``; it is made once."""
        return self._kept.of(program, sample, self._make)


class RaggedPacking:
    """Moves the samples of ragged tasks so that those that count come before the padding.

    Args:
        mask: bool ``[T, n]``, true where a sample counts; ``None`` where all do.

    Attributes:
        sizes: int64 ``[T]``, how many samples of each task count; ``[0]`` where all of them do.
    """

    def __init__(self, mask: Tensor | None) -> None:
        self.sizes = _ALL
        self._at = None
        if mask is not None:
            order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
            self.sizes = mask.sum(1)
            self._at = (torch.arange(len(mask))[:, None], order)

    def pack(self, x: Tensor) -> Tensor:
        """Returns ``x [T, n, ...]`` with the samples that count first."""
        return as_input(x) if self._at is None else as_input(x[self._at])

    def samples(self, loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns inputs, targets and sizes as operators take them."""
        return self.pack(x), self.pack(targets(loss, y, x.dtype)), self.sizes

    def unpack(self, x: Tensor) -> Tensor:
        """Puts the samples of ``x [T, n, ...]`` back into the order that they had before ``pack``."""
        return x if self._at is None else torch.empty_like(x).index_put_(self._at, x)


def support_samples(loss: Loss, support: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns inputs, targets and sizes as operators take them; sets of steps lie in a row, ``[S T, n, ...]``."""
    x, y, mask = support.x, support.y, support.mask
    if support.each_step:
        x, y, mask = x.flatten(0, 1), y.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
    return RaggedPacking(mask).samples(loss, x, y)


def unsupported_layer(program: Program, sample: tuple[int, ...]) -> str | None:
    """Says in words which layer C++ has no rules for, or why it cannot take samples of the shape ``sample``.

    It returns ``None`` where C++ runs the whole program on such samples.
    """
    if program.by_samples:
        return "what it computes depends on the number of samples"
    for node in program.nodes:
        layer: Any = node.layer
        if layer.kind not in FACTS["kinds"]:
            return f"{node.name}: no rules for {layer.kind!r}"
        if layer.kind == "flatten" and (layer.start, layer.end) not in ((1, -1), (1, 3)):
            return f"{node.name}: flatten of axes {layer.start}..{layer.end}; it flattens whole samples"
    if len(sample) not in (1, 3):
        return f"samples of shape {tuple(sample)}: it takes [features] and [C, H, W]"
    ranks = _ranks(program, len(sample))
    for node in program.nodes:
        rank = ranks[node.inputs[0]]
        if node.layer.input_rank not in (None, rank):
            return f"{node.name}: {node.layer.kind} of values with {rank} axes behind the samples"
    return None


def unsupported_loss(program: Program, shapes: TaskShapes) -> str | None:
    """Says in words for which loss, or for which targets of it, C++ has no rules; ``None`` where it has them all."""
    for name, loss, shape, dtype in losses_with_targets(program, shapes):
        if loss.kind not in LOSSES or loss.options:
            return f"loss {loss.label!r}: it has {' and '.join(LOSSES)} without options"
        if not loss.of_kind_alone(shape, dtype):
            return f"{loss.kind} of {name} of shape {tuple(shape)} and dtype {dtype}: it takes labels [T, n]"
    return None


def has_rules(loss: Loss, targets: Tensor) -> bool:
    """Says whether C++ computes the loss on these ``targets``, which are on the CPU: none of them is left out."""
    if loss.kind not in LOSSES or not loss.of_kind_alone(targets.shape, targets.dtype):
        return False
    return loss.kind not in _LABELLED or int(targets.min()) != LEFT_OUT


def as_input(x: Tensor) -> Tensor:
    """Returns ``x`` in contiguous memory and outside of autograd's graph, as operators take it."""
    return (x.detach() if x.requires_grad else x).contiguous()


def targets(loss: Loss, y: Tensor, real: torch.dtype) -> Tensor:
    """Returns the targets ``y`` as the loss in C++ reads them: labels in int64, and values in the dtype ``real``.

    Raises:
        ValueError: C++ has no rules for this loss; the executor that ``plan`` returns computes it in Python.
    """
    if loss.kind not in LOSSES:
        raise ValueError(f"no rules in C++ for the loss {loss.kind!r}: call the executor that plan() gives")
    dtype = torch.int64 if loss.kind in _LABELLED else real
    return y if y.dtype == dtype else y.to(dtype)


@cache
def in_double(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Makes a float64 tensor of ``values`` and keeps it for good, because a CUDA graph may read it at any time."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def call_op(op: Any, *arguments: Any) -> Any:
    """Calls an operator of C++.

    Raises:
        ValueError: an argument is wrong; the text says which.
        RuntimeError: the device, or the race checker of the twin, reports an error.
    """
    try:
        return op(*arguments)
    except RuntimeError as error:
        if str(error).startswith(("CUDA: ", "twin: ")):
            raise
        raise ValueError(str(error).removeprefix("metafast: ")) from None


def _ranks(program: Program, rank: int) -> list[int]:
    """Counts for each value the axes of one sample, where one sample of the input has ``rank``."""
    ranks = [rank]
    for node in program.nodes:
        ranks.append(1 if node.layer.kind == "flatten" else ranks[node.inputs[0]])
    return ranks


def _describe(program: Program, sample: tuple[int, ...], external_loss: bool) -> Tensor:
    """Writes a Program down in numbers: the loss and sizes, then the parameters, then the nodes with their options."""
    channels, height, width = sample if len(sample) == 3 else (*sample, 1, 1)
    loss = program.loss.kind if program.loss.kind in LOSSES and not external_loss else "external"
    if FACTS["losses"][loss]["reads"] == "labels" and _ranks(program, len(sample))[program.output] > 1:
        loss = "external"  # labels of pixels
    numbers: list[float] = [FACTS["losses"][loss]["number"], program.output, height, width, channels]
    numbers += [len(program.parameters), len(program.nodes)]
    for p in program.parameters:
        numbers += [p.offset, p.size, p.adapted and p.reached]
    constants = 0
    for node in program.nodes:
        options = node.layer.numbers([program.parameters[p].shape for p in node.params])
        numbers += [FACTS["kinds"][node.layer.kind], *_padded(node.inputs, 2), *_slots(node), constants]
        numbers += [len(options), *options]
        constants += sum(c.numel() for c in node.constants)
    return torch.tensor(numbers, dtype=torch.float64)


def _padded(indices: tuple[int, ...], length: int) -> list[int]:
    return [*indices, *[-1] * (length - len(indices))]


def _slots(node: Node) -> tuple[int, ...]:
    """Returns the numbers of the node's weight and bias; -1 stands for one that it has not.

    Raises:
        ValueError: a parameter has another name, and C++ has no place for it.
    """
    at = dict(zip(node.layer.parameter_names, node.params, strict=True))
    if not at.keys() <= {"weight", "bias"}:
        names = ", ".join(map(repr, node.layer.parameter_names))
        raise ValueError(f"{node.name}: {node.layer.kind} has parameters {names}; C++ knows 'weight' and 'bias'")
    return tuple(at.get(name, -1) for name in ("weight", "bias"))
