"""Says which statistics each batch norm of a model takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metafast.kernels.batch_norm import MODES

BatchNormMode: TypeAlias = str | Mapping[str, str] | None
"""A mode for every batch norm, or one by the name of a module; ``None`` leaves it to each module's own mode."""

STATISTICS = {
    "task": "task: the statistics of each pass over a task's own support or query samples, in training and test",
    "per_step": "per_step: the statistics of each pass over a task's own support or query samples, in training and "
    "test, with a scale and a shift for each inner step",
    "frozen": "frozen: the model's running statistics, which stay as they were",
    "running": "running: the model's running statistics, which training moves",
}
"""What each mode means, in words."""


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """Returns the batch norms of ``model`` by name; one that is used under two names counts once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def check_mode(model: nn.Module, bn: BatchNormMode) -> None:
    """Checks that every mode is known and has what it needs.

    Raises:
        ValueError: a mode or a name is unknown, or a mode needs what the module does not keep.
    """
    for mode in bn.values() if isinstance(bn, Mapping) else [bn]:
        if mode is not None and mode not in MODES:
            raise ValueError(f"bn={mode!r} is unknown; choose from {MODES}, or None for each module's own mode")
    norms = norms_of(model)
    for name in bn if isinstance(bn, Mapping) else ():
        if not any(_covers(name, norm) for norm in norms):
            close = difflib.get_close_matches(name, norms, 3, 0.4) or list(norms)[:6]
            raise ValueError(f"bn: {name!r} is no batch norm, nor a module with one, of this model; it has {close}")
    for name, mode in modes_of(model, bn, {}).items():
        norm = norms[name]
        if mode in ("frozen", "running") and norm.running_mean is None:
            raise ValueError(
                f"bn={mode!r} needs running statistics, but {name!r} keeps none (track_running_stats=False); use "
                'bn="task"'
            )
        if mode == "running" and norm.momentum is None:
            raise ValueError(f"{name!r} has momentum=None; bn='running' needs a number, such as momentum=0.1")


def modes_of(model: nn.Module, bn: BatchNormMode, trained: Mapping[str, bool]) -> dict[str, str]:
    """Returns the mode of each batch norm by name.

    Without a mode in ``bn`` a module in training takes the statistics of each pass, ``"task"``, and one in evaluation
    its running statistics, ``"frozen"``. ``trained`` says of modules by name whether they are in training, where that
    is not what they say themselves.
    """
    found = {}
    for name, norm in norms_of(model).items():
        given = bn
        if isinstance(bn, Mapping):
            covering = [key for key in bn if _covers(key, name)]
            given = bn[max(covering, key=len)] if covering else None
        own = "task" if trained.get(name, norm.training) or norm.running_mean is None else "frozen"
        found[name] = str(given) if given is not None else own
    return found


@contextmanager
def in_modes(model: nn.Module, modes: Mapping[str, str]) -> Iterator[None]:
    """Sets each batch norm to training or evaluation, as its mode wants, while the ``with`` block runs."""
    norms = norms_of(model)
    before = {name: norm.training for name, norm in norms.items()}
    for name, mode in modes.items():
        norms[name].training = mode in ("task", "per_step")
    try:
        yield
    finally:
        for name, training in before.items():
            norms[name].training = training


def statistics_of(model: nn.Module) -> list[Tensor]:
    """Lists the buffers of all batch norms."""
    return [buffer for norm in norms_of(model).values() for buffer in norm.buffers(recurse=False)]


def _covers(key: str, name: str) -> bool:
    return key in ("", name) or name.startswith(key + ".")
