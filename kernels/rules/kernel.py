"""Launches the kernels of a step and of its way back: one each, and one or two more where a norm is clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..primitives.launch import TILES, block, cdiv, empty, launch
from ..primitives.row_reductions import readable_sums
from .adam import metafast_adam, metafast_adam_vjp
from .clipping import metafast_gradient_squares, metafast_unclip
from .reference import StepForm
from .sgd import metafast_sgd, metafast_sgd_vjp

_KERNELS = {"sgd": (metafast_sgd, metafast_sgd_vjp), "adam": (metafast_adam, metafast_adam_vjp)}
_PARTS_AT_ONCE = 256  # that a program adds up of a norm


class StepLaunch:
    """Launches one step, or its way back.

    Args:
        form: which step it is.
        z: ``[T, (1 + K) P]``, theta and the state before it; tasks may share one row.
        gradient: ``[T, P]``; zero where a parameter does not move.
        rows: the hyper-parameters ``[H, 1 or P]``, float64.
        count: the number of the step, from 1.
        moved: true ``[P]`` where the inner loop moves the parameter.
    """

    def __init__(self, form: StepForm, z: Tensor, gradient: Tensor, rows: Tensor, count: int, moved: Tensor) -> None:
        self.form, self.count = form, count
        self.z = z if z.stride(-1) == 1 else z.contiguous()
        self.gradient, self.moved = gradient.contiguous(), moved.view(torch.int8)
        self.rows = rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
        self.tasks, self.size = gradient.shape
        self.block = block(self.size, 16, TILES.elements // 4)
        self.grid = (cdiv(self.size, self.block), self.tasks)
        self.constants: dict[str, Any] = {
            "NORM": form.row("max_norm"), "VALUE": form.row("max_value"), "WIDE": rows.shape[-1] > 1, "B": self.block,
        }  # fmt: skip
        self.squares = self._squares() if form.row("max_norm") else None

    def forward(self) -> Tensor:
        """Returns theta and the state after the step, ``[T, (1 + K) P]``."""
        out = empty(self.gradient, self.tasks, (1 + self.form.states) * self.size)
        self._launch(_KERNELS[self.form.kind][0], out, self.z)
        return out

    def vjp(self, v: Tensor, learns: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Takes the adjoint ``v [T, (1 + K) P]`` of what ``forward`` returns to those of what the step reads.

        Returns:
            Those of ``z`` and of the gradient, and where ``learns`` those of the rows, ``[H, 1 or P]`` in float64.
        """
        back, u = empty(v, *v.shape), empty(v, self.tasks, self.size)
        lines = len(self.form.hyper)
        wide = self.constants["WIDE"]
        shape = (lines, self.size) if wide else (self.grid[0], lines)
        parts = empty(v, self.tasks, *shape) if learns else None
        dots = None if self.squares is None else empty(v, self.tasks, self.grid[0])
        self._launch(_KERNELS[self.form.kind][1], back, u, parts, dots, v.contiguous(), self.z, H=lines)
        if self.squares is not None and dots is not None:
            dots = readable_sums(self.grid[0], dots)
            launch(
                metafast_unclip, self.grid, u, self.gradient, self.rows, self.moved, self.squares, dots, parts,
                self.rows.stride(0), self.squares.shape[1], dots.shape[1], self.size, H=lines, BT=_PARTS_AT_ONCE,
                **self.constants,
            )  # fmt: skip
        if parts is None:
            return back, u, None
        of_rows = parts.sum(0, dtype=torch.float64) if wide else parts.sum((0, 1), dtype=torch.float64)[:, None]
        return back, u, of_rows

    def _launch(self, kernel: Any, *tensors: Tensor | None, **constants: Any) -> None:
        tiles = 1 if self.squares is None else self.squares.shape[1]
        launch(
            kernel, self.grid, *tensors, self.gradient, self.rows, self.moved, self.squares, self.z.stride(0),
            self.rows.stride(0), tiles, self.count, self.size, STATES=self.form.states, OPTION=self.form.option,
            BT=_PARTS_AT_ONCE, **self.constants, **constants,
        )  # fmt: skip

    def _squares(self) -> Tensor:
        """Returns parts ``[T, blocks]`` of the square of the norm that the gradient has before it is scaled."""
        parts = empty(self.gradient, self.tasks, self.grid[0])
        constants = {name: self.constants[name] for name in ("VALUE", "WIDE", "B")}
        launch(
            metafast_gradient_squares, self.grid, parts, self.gradient, self.rows, self.rows.stride(0), self.size,
            **constants,
        )  # fmt: skip
        return readable_sums(self.grid[0], parts)
