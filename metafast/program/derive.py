"""Turns operations that have no rules of their own into one pure function of tensors, for a ``Derived`` layer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from metafast.program.operation import FunctionCall, Operation, Ref

aten = torch.ops.aten
_KINKED = {aten.linalg_vector_norm, aten.norm, aten.linalg_norm, aten.cosine_similarity, aten.cdist, aten.dist,
           aten.pairwise_distance, aten.frobenius_norm, aten.renorm, aten.std, aten.std_mean}  # fmt: skip
"""Functions that are not smooth at zero: there forward mode gives no number where reverse mode gives zero."""


@dataclass(frozen=True)
class Slot(Ref):
    """Stands for a tensor that a ``Cone`` is given or makes.

    Attributes:
        kind: ``"parameter"``, ``"input"`` or ``"constant"``, or ``"made"`` for a result of one of its steps.
        number: which of them.
        part: which result of the step.
    """

    kind: str
    number: int
    part: int = 0


@dataclass(frozen=True)
class Step:
    """Describes one call of a ``Cone``.

    Attributes:
        target: what is called; each time it gets lists and dicts of its own, so that it cannot change these.
        args: its arguments, with a ``Slot`` in the place of each tensor, also of those in lists and dicts.
        kwargs: likewise, as pairs of name and value.
        grad: whether gradients go through it.
        autocast: device and dtype of the autocast that it runs under.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    grad: bool
    autocast: tuple[str, torch.dtype] | None

    def __getstate__(self) -> dict[str, Any]:
        """Names an operator of torch, which cannot be pickled itself."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        target = self.target
        return {**state, "target": target.name() if isinstance(target, torch._ops.OpOverload) else target}

    def __setstate__(self, state: dict[str, Any]) -> None:
        target = state["target"]
        self.__dict__.update(state, target=_operator(target) if isinstance(target, str) else target)

    @cached_property
    def _arguments(self) -> tuple[list[Any], TreeSpec]:
        """Takes the arguments apart once, since a step runs often."""
        return tree_flatten((*self.args, *(value for _, value in self.kwargs)))

    def run(self, known: dict[Slot, Any]) -> Any:
        """Calls ``target`` on what is ``known``."""
        leaves, structure = self._arguments
        values = tree_unflatten([known[v] if isinstance(v, Slot) else v for v in leaves], structure)
        args, named = values[: len(self.args)], values[len(self.args) :]
        kwargs = {name: value for (name, _), value in zip(self.kwargs, named, strict=True)}
        if self.grad and self.autocast is None:
            return self.target(*args, **kwargs)
        with ExitStack() as stack:
            if not self.grad:
                stack.enter_context(torch.no_grad())
                stack.enter_context(torch.autograd.forward_ad._set_fwd_grad_enabled(False))
            if self.autocast is not None:
                device, dtype = self.autocast
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            return self.target(*args, **kwargs)


def _operator(name: str) -> Any:
    """Returns the operator of torch with a name such as ``"aten::add.Tensor"``."""
    packet, _, overload = name.partition(".")
    namespace, _, packet = packet.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


@dataclass(frozen=True)
class Cone:
    """Computes one value of a module for one task: ``cone(params, inputs, constants) -> tensor``.

    Two cones are equal where they compute the same.

    Attributes:
        steps: the calls in their order.
        result: the value that it returns.
    """

    steps: tuple[Step, ...]
    result: Slot

    def __call__(
        self, params: tuple[Tensor, ...], inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...] = ()
    ) -> Tensor:
        known: dict[Slot, Any] = {}
        for kind, tensors in (("parameter", params), ("input", inputs), ("constant", constants)):
            known.update((Slot(kind, i), tensor) for i, tensor in enumerate(tensors))
        for number, step in enumerate(self.steps):
            found = step.run(known)
            for part, tensor in enumerate(found if isinstance(found, tuple | list) else (found,)):
                known[Slot("made", number, part)] = tensor
        result = known[self.result]
        # A tensor that lies in one of the arguments must not be taken for a new one.
        return result.clone() if any(result is t for t in (*params, *inputs, *constants)) else result

    def __hash__(self) -> int:
        return hash(tuple(str(step.target) for step in self.steps[:4]))

    @property
    def calls_functions(self) -> bool:
        """Says whether one of the steps is a ``torch.autograd.Function``."""
        return any(isinstance(step.target, FunctionCall) for step in self.steps)

    @property
    def reverse_only(self) -> bool:
        """Says whether second derivatives are to be had from the graph of its gradient alone."""
        kinked = any(getattr(step.target, "overloadpacket", None) in _KINKED for step in self.steps)
        return kinked or self.calls_functions


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any, **options: Any
) -> Tensor:
    """Computes ``softmax(q k' / sqrt d) v`` by operations that can be differentiated twice."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    math = aten._scaled_dot_product_attention_math.default
    return math(query, key, value, mask, *args, **options)[0]


def embedding(weight: Tensor, indices: Tensor, padding: int = -1, *options: Any) -> Tensor:
    """Looks up the rows ``indices`` of ``weight``; that of ``padding`` gets no gradient.

    torch's own function forgets the padding where it is mapped over several weights, and takes an index beyond the last
    row for one of the next weight's. Here it gives no number.
    """
    inside = (indices >= 0) & (indices < weight.shape[0])
    indices = indices.clamp(0, weight.shape[0] - 1)
    if padding >= 0:
        row = torch.arange(weight.shape[0], device=weight.device) == padding
        weight = torch.where(row[:, None], weight.detach(), weight)
    found = aten.embedding.default(weight, indices, -1, *options)
    return torch.where(inside[..., None], found, float("nan"))


def as_step(operation: Operation, slots: dict[Ref, Slot]) -> Step:
    """Returns the step that repeats an operation, with the slot of each value that it reads."""
    arguments = operation.arguments()
    args, kwargs = operation.args, operation.kwargs
    statistics = _statistics_taken_anew(operation, arguments)
    if statistics is not None:
        args, kwargs = statistics, {}
    target = _REPLACED.get(operation.target, operation.target)
    args, kwargs = tree_map_only(Ref, slots.__getitem__, (tuple(args), kwargs))
    return Step(target, args, tuple(kwargs.items()), operation.grad, operation.autocast)


_REPLACED = {aten.scaled_dot_product_attention.default: attention, aten.embedding.default: embedding}
"""Operators in whose place others are called, which can be differentiated twice and mapped."""


def _statistics_taken_anew(operation: Operation, arguments: dict[str, Any]) -> tuple[Any, ...] | None:
    """Returns the arguments of a norm in training without its running statistics, which it would write to."""
    anew = arguments.get("training") is True or arguments.get("use_input_stats") is True
    if not anew or "running_mean" not in arguments:
        return None
    return tuple(None if name in ("running_mean", "running_var") else value for name, value in arguments.items())
