"""The contract that every layer keeps: four rules, each for all tasks at once.

Shapes carry a leading task axis: activations ``[T, n, ...]``, parameters ``[T, *shape]``. For a value ``x`` the
rules speak of its tangent ``xd`` (derivative along a parameter direction), its adjoint ``g_x = dL/dx`` and the
tangent of that adjoint ``gd_x``. A tangent of ``None`` is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Tensors = Sequence[Tensor]
Tangents = Sequence[Tensor | None]


class RuleContext:
    """What one node remembers between its rules during one pass over a batch.

    ``step`` is the inner step that the pass belongs to, ``mask`` ``[T, n]`` marks the samples that count (``None``:
    all), ``needs_inputs`` and ``needs_params`` say which adjoints are wanted, and ``seeds`` int64 ``[T]`` are those of
    each task's random numbers (``None``: it has none). Rules add attributes of their own.
    """

    def __init__(
        self,
        step: int,
        mask: Tensor | None,
        needs_inputs: tuple[bool, ...],
        needs_params: tuple[bool, ...],
        seeds: Tensor | None = None,
    ) -> None:
        self.step = step
        self.mask = mask
        self.needs_inputs = needs_inputs
        self.needs_params = needs_params
        self.seeds = seeds

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this pass has not kept {name!r}: a rule ran before the one that keeps it")


class Layer:
    """Four rules. Options are dataclass fields of the subclass; a layer holds no tensors and no state.

    ``constants`` are tensors that the node brings along (buffers of the user's module): never differentiated.
    """

    kind: ClassVar[str]
    varies: ClassVar[bool] = False
    """Does the map change from inner step to inner step by itself? Its parameters then have a row for each."""
    carries_gradient: ClassVar[bool] = True
    """Goes an adjoint of the output on to the inputs? Where none does, only ``forward`` is called."""
    keeps_channels: ClassVar[bool] = False
    """Does each channel of the output follow from the same channel of the input, at any size of an image?"""
    input_rank: ClassVar[int | None] = None
    """The axes behind the samples that the rules in C++ ask of an input; ``None``: any number."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """What torch calls the parameters, in the order in which the rules take them."""
        return ()

    @property
    def constant_names(self) -> tuple[str, ...]:
        """What torch calls the constants, likewise."""
        return ()

    def numbers(self, shapes: Sequence[tuple[int, ...]]) -> list[float]:
        """What the rules in C++ are told beside the sizes of values, in the order in which csrc reads it.

        ``shapes`` are those of the node's parameters.
        """
        return []

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        """``y`` of shape ``[T, n, ...]``; keeps in ``ctx`` what the other rules need."""
        raise NotImplementedError

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        """Adjoints of the inputs and of the parameters, ``None`` where ``ctx.needs_*`` is false; keeps ``g_y``."""
        raise NotImplementedError

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        """``yd``, after ``backward``; at least one tangent given is not ``None``."""
        raise NotImplementedError

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        """Tangents of what ``backward`` returned, along the direction given to ``tangent_forward``."""
        raise NotImplementedError


class Loss:
    """A loss of outputs ``[T, n, ...]`` and targets, one value a task, which is a mean if nothing else is said.

    Where autograd is enabled it records what the rules do, so that they can be differentiated to any order.
    """

    kind: ClassVar[str]
    function: Callable[..., Tensor]
    """What the loss stands for: PyTorch's or the user's function of one task's outputs and targets, or their module."""
    reads_targets: ClassVar[bool] = True
    """Does ``check`` depend on the values of the targets, not on their shape and dtype alone?"""

    @property
    def module(self) -> nn.Module | None:
        """The user's module, where ``function`` is one."""
        return self.function if isinstance(self.function, nn.Module) else None

    @property
    def options(self) -> dict[str, Any]:
        """The options that are not as usual, by name."""
        return {}

    def now(self, option: str) -> Any:
        """Returns an option: that of the user's module where there is one, which may have changed it since."""
        return getattr(self if self.module is None else self.module, option)

    @property
    def label(self) -> str:
        """The kind with the options, for users."""
        options = (f"{k}={'...' if isinstance(v, Tensor) else repr(v)}" for k, v in self.options.items())
        return f"{self.kind}({', '.join(options)})" if self.options else self.kind

    def of_kind_alone(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Is this the loss that code means which knows losses by their kinds alone, such as C++ and kernels?

        ``shape [T, n, ...]`` and ``dtype`` are those of the targets.
        """
        return self._stays_usual or not self.options

    @cached_property
    def _stays_usual(self) -> bool:
        """Is it without options now, and is there no module of the user's that could give it some?"""
        return self.module is None and not self.options

    def check(self, output: tuple[int, ...], targets: Tensor, name: str) -> None:
        """Looks at ``targets [T, n, ...]``, which the user knows as ``name``, beside outputs of samples ``output``.

        Raises:
            ValueError: their shape or their values do not suit.
            TypeError: their dtype does not.
        """

    def forward(self, ctx: RuleContext, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses ``[T]``, each of the samples of its task that ``ctx.mask`` keeps."""
        raise NotImplementedError

    def backward(self, ctx: RuleContext) -> Tensor:
        """``g = d loss[t] / d outputs[t]``, of the shape of the outputs."""
        raise NotImplementedError

    def tangent_backward(self, ctx: RuleContext, d_outputs: Tensor) -> Tensor:
        """``gd``: the Hessian of each task's loss in its outputs, applied to ``d_outputs``."""
        raise NotImplementedError


def check_reduction(reduction: str) -> None:
    """Raises ValueError where a loss is not reduced to a scalar."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: the loss of a task is one number; choose 'mean' or 'sum'")
