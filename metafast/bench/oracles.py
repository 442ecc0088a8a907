"""Keeps the float64 truth of a workload in a file, so that one machine computes it and another is judged by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .peers import TorchLoop
from .workloads import LR, Workload

_GRADIENT = "gradient "

Oracle = tuple[np.ndarray, dict[str, np.ndarray]]
"""The query losses ``[T]``, and the gradient of their mean by parameter name, in float64."""


def compute(workload: Workload) -> Oracle:
    """Computes the oracle by ``torch.autograd`` in float64 on the CPU, one task after the other."""
    losses, gradient = TorchLoop().prepare(workload, workload.draw().to(torch.float64))()
    return losses.detach().numpy(), {name: value.numpy() for name, value in gradient.items()}


def save(folder: Path, workload: Workload, oracle: Oracle) -> Path:
    """Writes the oracle into ``folder/<name>.npz`` and returns that path."""
    losses, gradient = oracle
    file = folder / f"{workload.name}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {_GRADIENT + name: value for name, value in gradient.items()}
    np.savez_compressed(file, losses=losses, **arrays)
    return file


def load(folder: Path, workload: Workload) -> Oracle:
    """Reads what ``save`` has written.

    Raises:
        FileNotFoundError: the folder has no file for this workload.
        ValueError: the file holds other parameters or another number of tasks than the workload has now.
    """
    file = folder / f"{workload.name}.npz"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: it would hold the float64 oracle of {workload.name}")
    with np.load(file, allow_pickle=False) as arrays:
        losses = arrays["losses"]
        gradient = {key.removeprefix(_GRADIENT): arrays[key] for key in arrays.files if key.startswith(_GRADIENT)}
    wanted = {name: tuple(p.shape) for name, p in workload.network().named_parameters()}
    if workload.learns_lr:
        wanted[LR] = ()
    if losses.shape != (workload.tasks,) or {name: g.shape for name, g in gradient.items()} != wanted:
        raise ValueError(f"{file} is of another {workload.name} than this one: work it out again")
    return losses, gradient
