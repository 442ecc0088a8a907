"""Says which parameters of a model the inner loop moves."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def resolve_names(model: nn.Module, chosen: Iterable[str | nn.Module] | str | nn.Module) -> set[str]:
    """Returns the names of the parameters that ``chosen`` covers: names of parameters or modules, or modules.

    Raises:
        ValueError: a name or module that the model does not have, or one without parameters.
        TypeError: something is neither.
    """
    if not isinstance(chosen, str | nn.Module | Iterable):
        raise TypeError(f"adapt={chosen!r}: it takes names of parameters and modules, or modules")
    items = [chosen] if isinstance(chosen, str | nn.Module) else list(chosen)
    # A parameter that several modules share counts under the first of its names.
    first = {id(p): name for name, p in model.named_parameters()}
    parameters = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    modules = {module: name for name, module in model.named_modules()}
    found: set[str] = set()
    for item in items:
        if not isinstance(item, str | nn.Module):
            raise TypeError(f"{item!r} is neither a name nor a module; adapt takes names of parameters and modules")
        if isinstance(item, nn.Module):
            if item not in modules:
                raise ValueError(f"{type(item).__name__} is not a module of this model; pass one of its own, or a name")
            item = modules[item]
        covered = {
            known for name, known in parameters.items() if name == item or item == "" or name.startswith(item + ".")
        }
        if not covered:
            holders = [name for module, name in modules.items() if name and any(True for _ in module.parameters())]
            known = [*holders, *parameters]
            close = difflib.get_close_matches(item, known, 3, 0.4) or known[:6]
            raise ValueError(f"{item!r} is no parameter, nor a module with parameters, of this model; it has {close}")
        found |= covered
    if not found:
        raise ValueError("adapt is empty: name at least one parameter or module for the inner loop to move")
    return found


def without_batch_norm(model: nn.Module) -> list[str]:
    """Returns the names of all parameters but those of batch norms, which is what the MAML papers adapt."""
    norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    return [name for name, _ in model.named_parameters() if not any(name.startswith(norm + ".") for norm in norms)]
