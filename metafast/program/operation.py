"""Defines what a recording is made of: operations, and the values that they read and make."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


class CaptureError(TypeError):
    """Is raised where the model cannot become a Program; it names the line in the user's model and the remedy."""


class Ref:
    """Stands for a tensor among the arguments of an operation."""


@dataclass(frozen=True)
class Input(Ref):
    """Stands for the input of that number."""

    number: int


@dataclass(frozen=True)
class Weight(Ref):
    """Stands for the parameter of that name."""

    name: str


@dataclass(frozen=True, eq=False)
class Constant(Ref):
    """Stands for a buffer, or for a tensor that the module holds or makes; it is equal to itself alone.

    Attributes:
        tensor: the live tensor, which may be written to between calls.
    """

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


@dataclass(frozen=True)
class Made(Ref):
    """Stands for result number ``part`` of an operation."""

    operation: int
    part: int = 0


def refs_in(tree: Any) -> list[Ref]:
    """Lists the references among nested arguments, each once."""
    return list(dict.fromkeys(leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Ref)))


DETACHING = (torch.ops.aten.detach.default, torch.ops.aten.detach_.default)
"""The operators through which no gradient goes."""


@dataclass(frozen=True)
class Operation:
    """Describes one call.

    Attributes:
        target: what was called.
        args: its arguments, in which a ``Ref`` stands for each tensor.
        kwargs: likewise, by name.
        grad: whether gradients go through it; they do not under ``torch.no_grad()``.
        autocast: device and dtype of the autocast that it ran under.
        line: the user's line, as ``file:number (text)``; empty where the call was torch's own.
        path: the name of the innermost module that made the call.
        leaf: the class of that module, where it has no modules of its own; else empty.
        results: how many tensors it returned.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    autocast: tuple[str, torch.dtype] | None
    line: str
    path: str
    leaf: str
    results: int

    @cached_property
    def reads(self) -> list[Ref]:
        """Lists the values that it reads, each once."""
        return refs_in((self.args, self.kwargs))

    @property
    def name(self) -> str:
        """Returns the name by which people know the call, such as ``softmax``."""
        packet = getattr(self.target, "overloadpacket", self.target)
        return str(getattr(packet, "__name__", packet)).split(".")[-1]

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments by the names of the operator's schema, the defaults among them.

        The first one, which torch calls ``self``, is ``input``.
        """
        return by_name(self.target, self.args, self.kwargs)


def by_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by name, the defaults among them; empty where nobody knows the names."""
    if isinstance(target, FunctionType):
        return dict(inspect.signature(target).bind(*args, **kwargs).arguments)
    schema = getattr(target, "_schema", None)
    if schema is None:
        return {}
    found = {}
    for position, argument in enumerate(schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(
            argument.name, argument.default_value if argument.has_default_value() else None
        )  # fmt: skip
        found["input" if argument.name == "self" else argument.name] = value
    return found


@dataclass(frozen=True)
class FunctionCall:
    """Calls a ``torch.autograd.Function`` as an operation."""

    function: type

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)  # type: ignore[attr-defined]


@dataclass
class Recording:
    """Holds what one run of a module did.

    Attributes:
        operations: the operations in their order; none of them changes a tensor.
        output: the value that the module returned.
        inputs: the shape of each tensor that the module was given.
        dtypes: the dtype of each.
        several: whether these are the parts of ``Samples``.
        values: shape and dtype of each value that an operation made.
        guards: buffers and constants whose numbers Python has read.
        changes_module: whether the run left buffers or attributes of the module other than it found them.
        draws: how often random numbers were drawn.
        assigned: the attributes that the run set to something else than a plain value, such as a tensor to be looked at
            later, and that no operation reads: the ``id`` of the module's dictionary, and the name.
    """

    operations: list[Operation] = field(default_factory=list)
    output: Ref = field(default_factory=lambda: Input(0))
    inputs: list[torch.Size] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    several: bool = False
    values: dict[Made, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    guards: list[Tensor] = field(default_factory=list)
    changes_module: bool = False
    draws: int = 0
    assigned: frozenset[tuple[int, str]] = frozenset()

    def constants(self) -> set[int]:
        """Returns the ``id`` of each buffer and constant that an operation reads."""
        refs = (ref for operation in self.operations for ref in operation.reads)
        return {id(ref.tensor) for ref in refs if isinstance(ref, Constant)}

    def behind(self, refs: Iterable[Ref], into: Callable[[Made], bool] = lambda ref: True) -> set[Ref]:
        """Returns ``refs`` and what they are made of; of values that ``into`` denies, nothing that they are made of."""
        found: set[Ref] = set()
        waiting = list(refs)
        while waiting:
            ref = waiting.pop()
            if ref not in found:
                found.add(ref)
                if isinstance(ref, Made) and into(ref):
                    waiting += self.operations[ref.operation].reads
        return found

    def reached(self) -> set[str]:
        """Returns the names of the parameters that a gradient goes back to from the output."""

        def carries(ref: Made) -> bool:
            operation, real = self.operations[ref.operation], self.values.get(ref, (None, torch.float32))[1]
            return operation.grad and operation.target not in DETACHING and real.is_floating_point

        return {ref.name for ref in self.behind([self.output], carries) if isinstance(ref, Weight)}

    @property
    def output_shape(self) -> torch.Size:
        """Returns the shape of the output ``[n, ...]``."""
        if isinstance(self.output, Made):
            return self.values[self.output][0]
        return self.inputs[self.output.number] if isinstance(self.output, Input) else torch.Size()

    @property
    def is_coarse(self) -> bool:
        """Says whether some operation computes in less than float32, as under autocast."""
        halves = (torch.bfloat16, torch.float16)
        return any(o.autocast for o in self.operations) or any(dtype in halves for _, dtype in self.values.values())
