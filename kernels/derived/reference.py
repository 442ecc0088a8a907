"""Any function of tensors as a layer: its four rules by torch.autograd, for all tasks at once.

With ``J`` the Jacobian of ``f`` at ``(p, x)``, and ``d = (pd, xd)``,

    backward          (g_p, g_x) = J' g_y
    tangent_forward   yd = J d
    tangent_backward  (gd_p, gd_x) = d/d(p, x) <J' g_y, d> + J' gd_y

The third holds because the Jacobian of ``J' g_y`` is the Hessian of ``<f, g_y>``, which is symmetric. ``f`` is mapped
over the task axis by torch.vmap, and where that cannot, computed task by task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..contract.layer import Layer, RuleContext, Tangents, Tensors

Function = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]

_REINTERPRETING = ("aten.view_as_complex", "aten.view.dtype")
"""Operations that take the numbers of a tensor for others where they lie, which asks for an even place in memory."""


@dataclass
class Mapping:
    """Whether torch.vmap maps a function over tasks; false since it was seen that it cannot."""

    works: bool = True


@dataclass(frozen=True)
class Derived(Layer):
    """``y = function(params, inputs, constants)`` for one task. ``label`` names it to people.

    ``reverse_only`` says that its second derivatives are to be had from the graph of its gradient alone: that of a
    ``torch.autograd.Function`` is what its author says, and need not be symmetric, and that of a norm is finite at zero
    where forward mode is not. ``mapping`` belongs to this layer alone: an equal layer of another model finds out for
    itself, and keeps what it has found.
    """

    kind = "derived"
    function: Function
    label: str
    reverse_only: bool = False
    mapping: Mapping = field(default_factory=Mapping, init=False, compare=False, repr=False)

    @property
    def operations(self) -> tuple[str, ...]:
        """The names of the operations that it consists of, as far as they are known."""
        return tuple(str(step.target) for step in getattr(self.function, "steps", ()))

    @cached_property
    def reads_memory(self) -> bool:
        """Whether it may depend on where a tensor lies, and not only on its numbers."""
        calls_functions = getattr(self.function, "calls_functions", False)
        return calls_functions or any(name.startswith(_REINTERPRETING) for name in self.operations)

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.p, ctx.x, ctx.c = tuple(params), tuple(inputs), tuple(constants)
        return self._over_tasks(ctx, ctx.p, ctx.x)

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = g_y
        leaves, y = self._traced(ctx)
        return self._wanted(ctx, _vjp(y, leaves, g_y, create_graph=torch.is_grad_enabled()))

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        ctx.d = [
            None if d is None else d.expand_as(t) for d, t in zip((*d_params, *d_inputs), (*ctx.p, *ctx.x), strict=True)
        ]
        if not self.reverse_only and not torch.is_grad_enabled():
            try:
                return self._pushed(ctx)
            except (RuntimeError, NotImplementedError):  # an operation without forward mode
                pass
        return self._pulled_twice(ctx)

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        recording = torch.is_grad_enabled()
        leaves, y = self._traced(ctx)
        plain = _vjp(y, leaves, gd_y, create_graph=recording)
        with torch.enable_grad():
            pulled = _vjp(y, leaves, ctx.g, create_graph=True)
            pairs = _along(pulled, ctx.d)
        if pairs:
            outputs, along = zip(*pairs, strict=True)
            curved = torch.autograd.grad(
                outputs, _floating(leaves), along, retain_graph=recording, create_graph=recording, allow_unused=True
            )
            plain = _sums(plain, _spread(leaves, curved))
        return self._wanted(ctx, plain)

    def _over_tasks(self, ctx: RuleContext, params: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Tensor:
        """``y [T, ...]``."""
        own = _in_own_memory if self.reads_memory else _as_it_is
        if self.mapping.works:
            torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # a loop in torch is no news to the user
            try:
                return torch.vmap(lambda p, x: self.function(p, x, ctx.c))(
                    tuple(map(own, params)), tuple(map(own, inputs))
                )
            except Exception:  # whatever is wrong with the function itself shows again below
                pass
        results = [
            self.function(tuple(own(p[t]) for p in params), tuple(own(x[t]) for x in inputs), ctx.c)
            for t in range((*params, *inputs)[0].shape[0])
        ]
        self.mapping.works = False
        return torch.stack(results)

    def _traced(self, ctx: RuleContext) -> tuple[list[Tensor], Tensor]:
        """Parameters and inputs as leaves, one after another, and ``y`` with its graph from them."""
        with torch.enable_grad():
            along = vars(ctx).get("d") or [None] * len(ctx.p + ctx.x)
            needs = zip((*ctx.needs_params, *ctx.needs_inputs), along, strict=True)
            wanted = [needed or d is not None for needed, d in needs]
            leaves = [_leaf(t) if w else t for t, w in zip((*ctx.p, *ctx.x), wanted, strict=True)]
            return leaves, self._over_tasks(ctx, tuple(leaves[: len(ctx.p)]), tuple(leaves[len(ctx.p) :]))

    def _pushed(self, ctx: RuleContext) -> Tensor:
        """``J d`` by forward mode."""
        # A torch.autograd.Function switches forward mode off around its forward, and tangents would be lost silently.
        with forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level():
            duals = [
                t if d is None else forward_ad.make_dual(t, d) for t, d in zip((*ctx.p, *ctx.x), ctx.d, strict=True)
            ]
            y = self._over_tasks(ctx, tuple(duals[: len(ctx.p)]), tuple(duals[len(ctx.p) :]))
            primal, tangent = forward_ad.unpack_dual(y)
            return torch.zeros_like(primal) if tangent is None else tangent.clone()

    def _pulled_twice(self, ctx: RuleContext) -> Tensor:
        """``J d`` by reverse mode twice: ``J' g`` is linear in ``g``, and its own adjoint map is ``J``."""
        recording = torch.is_grad_enabled()
        leaves, y = self._traced(ctx)
        with torch.enable_grad():
            g = _leaf(ctx.g)
            pulled = _vjp(y, leaves, g, create_graph=True)
            pairs = [
                (p, d)
                for p, d in zip(pulled, ctx.d, strict=True)
                if p is not None and d is not None and p.requires_grad
            ]
        if not pairs:
            return torch.zeros_like(ctx.g)
        found = torch.autograd.grad(
            [p for p, _ in pairs], g, [d for _, d in pairs], create_graph=recording, allow_unused=True
        )[0]
        return torch.zeros_like(ctx.g) if found is None else found

    @staticmethod
    def _wanted(ctx: RuleContext, found: Tangents) -> tuple[Tangents, Tangents]:
        count = len(ctx.p)
        return (
            tuple(g if needed else None for g, needed in zip(found[count:], ctx.needs_inputs, strict=True)),
            tuple(g if needed else None for g, needed in zip(found[:count], ctx.needs_params, strict=True)),
        )


def compute_task_by_task(layer: Layer) -> bool:
    """Has a derived layer computed without torch.vmap from now on; it says whether that is news."""
    if not isinstance(layer, Derived) or not layer.mapping.works:
        return False
    layer.mapping.works = False
    return True


def _as_it_is(t: Tensor) -> Tensor:
    return t


def _in_own_memory(t: Tensor) -> Tensor:
    """``t`` at the beginning of memory of its own, as the parameters of a module are; it was part of a flat vector.

    The product with one gives memory of its own to the adjoint on its way back too, where a clone passes it on.
    """
    return t.contiguous() * 1 if t.is_floating_point() else t.clone()


def _leaf(t: Tensor) -> Tensor:
    """A tensor with the values of ``t`` to differentiate with respect to; it belongs to the graph of ``t``, if any."""
    if not t.is_floating_point():
        return t
    return t.view_as(t) if torch.is_grad_enabled() and t.requires_grad else t.detach().requires_grad_()


def _floating(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf for leaf in leaves if leaf.requires_grad]


def _vjp(y: Tensor, leaves: Sequence[Tensor], g: Tensor, create_graph: bool) -> list[Tensor | None]:
    """``J' g`` for each of ``leaves``; ``None`` where ``y`` does not depend on it."""
    if not y.requires_grad:
        return [None] * len(leaves)
    found = torch.autograd.grad(
        y, _floating(leaves), g, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return _spread(leaves, found)


def _spread(leaves: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``found``, which has an entry for each leaf of real numbers, with ``None`` for the others."""
    rest = iter(found)
    return [next(rest) if leaf.requires_grad else None for leaf in leaves]


def _sums(a: Tangents, b: Tangents) -> list[Any]:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def _along(pulled: Tangents, d: Tangents) -> list[tuple[Tensor, Tensor]]:
    """The adjoints that depend on something, each with its direction, where there is one."""
    pairs = [(p, u) for p, u in zip(pulled, d, strict=True) if p is not None and u is not None]
    return [(p, u) for p, u in pairs if p.requires_grad]
