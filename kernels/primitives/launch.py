"""What every Triton launcher needs: where a kernel runs, memory layouts, block sizes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass
class Tiles:
    """The largest block that one program works on.

    Of a product it makes ``rows x columns`` in steps of ``depth``; elsewhere it has ``elements``. The defaults fit the
    registers of 128 or 256 threads.
    """

    rows: int = 128
    columns: int = 64
    depth: int = 32
    elements: int = 2048


TILES = Tiles()
REACH = 2**31 - 1  # elements of a task that a kernel can address: its offsets within a task have 32 bits
MAX_REGISTERS = 255  # that a thread can have
REGISTERS_BOUND_FROM = 90  # the first architecture on which operands of products need not pass through registers


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Runs ``kernel`` on ``grid``, whose axes are (tile, task, ...); on tensors without memory it does nothing.

    ``settings`` are the kernel's constants, and those of ``options`` that are not the usual ones.
    """
    if args[0].is_meta:
        return
    chosen, constants = options(_architecture(args[0].device), **settings)
    kernel[grid](*args, **constants, **chosen)


def options(
    architecture: int, warps: int = 4, stages: int = 3, registers: int | None = None, **constants: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Triton's options for a launch, and the kernel's constants.

    A thread gets at most ``registers`` where the GPU's matrix instructions leave room for such a bound. Elsewhere it
    may have as many as there are: an assembler that is told nothing stops earlier and spills.
    """
    limit = registers if architecture >= REGISTERS_BOUND_FROM else MAX_REGISTERS
    bound = {} if registers is None else {"maxnreg": limit}
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **bound}, constants


@functools.lru_cache
def _architecture(device: torch.device) -> int:
    """90 for Hopper; 0 where there is no GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; where there is none those of an H100, for which plans are then made."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def block(extent: int, low: int, high: int) -> int:
    """The power of two that covers ``extent``, between two others."""
    return max(low, min(high, triton.next_power_of_2(extent)))


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def within_reach(x: Tensor) -> None:
    """Raises ValueError where a task of ``x [T, ...]`` has more values than kernels count."""
    if x[0].numel() > REACH:
        raise ValueError(f"a task has {x[0].numel():,} values here, and kernels count {REACH:,}: give it fewer samples")


def channels_last(x: Tensor) -> Tensor:
    """``[T,n,C,...]`` -> ``[T,n,...,C]``, contiguous; free where the memory has that order already."""
    within_reach(x)
    return x.movedim(2, -1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """``[T,n,...,C]`` -> ``[T,n,C,...]``, a view: shapes follow torch while the memory stays channels-last."""
    return x.movedim(-1, 2)


def pixels_last(x: Tensor) -> Tensor:
    """``x`` with the memory of images in the order ``[T,n,H,W,C]``, and anything else contiguous."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if x.dim() == 5 else x.contiguous()


def by_task(parameter: Tensor) -> tuple[Tensor, int]:
    """A parameter ``[T, ...]``, and the number of elements from one task's to the next: zero while tasks share it."""
    if not parameter[0].is_contiguous():
        parameter = parameter.contiguous()
    return parameter, parameter.stride(0)


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result, on the device and (unless told) of the dtype of ``like``."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
