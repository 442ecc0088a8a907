"""Checks of what users hand in; each error names the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import Tensor, nn

from metafast.tasks import TaskBatch


def check_like(tasks: TaskBatch, learner: nn.Module) -> None:
    """The batch must live where the learner lives, in its dtype."""
    tensors = {name: t for name, t in learner.state_dict().items() if t.is_floating_point()}
    for name in ("support_x", "query_x"):
        x: Tensor = getattr(tasks, name)
        for known, tensor in tensors.items():
            if x.device != tensor.device:
                raise ValueError(
                    f"{name} is on {x.device} and {known} on {tensor.device}; use tasks.to(device) and "
                    "learner.to(device) with one device"
                )
            if x.dtype != tensor.dtype:
                raise TypeError(
                    f"{name} has dtype {x.dtype} and {known} {tensor.dtype}; use tasks.to({tensor.dtype}) or "
                    f"learner.to({x.dtype})"
                )


def resolve_names(model: nn.Module, chosen: Iterable[str | nn.Module] | str | nn.Module) -> set[str]:
    """Names of the parameters that ``chosen`` covers: parameter names, module names, or modules of ``model``.

    Raises:
        ValueError: a name or module that the model does not have, or one without parameters.
    """
    items = [chosen] if isinstance(chosen, str | nn.Module) else list(chosen)
    parameters = [name for name, _ in model.named_parameters()]
    modules = {module: name for name, module in model.named_modules()}
    found: set[str] = set()
    for item in items:
        if isinstance(item, nn.Module):
            if item not in modules:
                raise ValueError(f"{type(item).__name__} is not a module of this model; pass one of its own, or a name")
            item = modules[item]
        covered = {name for name in parameters if name == item or item == "" or name.startswith(item + ".")}
        if not covered:
            known = [*parameters, *(name for name in modules.values() if name)]
            close = difflib.get_close_matches(item, known, 3, 0.4) or known[:6]
            raise ValueError(f"{item!r} is no parameter, nor a module with parameters, of this model; it has {close}")
        found |= covered
    if not found:
        raise ValueError("adapt is empty: name at least one parameter or module for the inner loop to move")
    return found
