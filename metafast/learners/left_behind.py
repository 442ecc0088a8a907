"""Refuses a loss that reads what a run of the model leaves behind, in an attribute or through a hook.

metafast runs the model when it captures it, and not again for each batch: what lies there is that of another run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from metafast.learners.globals_read import names_in
from metafast.learners.images import contents, functions_in, is_foreign

Place = tuple[Any, Any]
"""A dictionary or a list, and a key of it or a number in it."""


def places_of_hooks(model: nn.Module, loss: Any) -> list[Place]:
    """Lists where tensors lie that hooks of the model may have put there, and that a loss of the user's can reach."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if not hooks:
        return []
    reached = _holders(loss)
    shared = [holder for hook in hooks for key, holder in _holders(hook).items() if key in reached]
    keys = [(h, k) for h in shared for k in (list(h) if isinstance(h, dict) else range(len(h)))]
    return [(holder, key) for holder, key in keys if isinstance(holder[key], Tensor | list | dict)]


def check_left_behind(model: nn.Module, places: Iterable[Place], run: Callable[[], Any]) -> None:
    """Runs a loss with an object of no use in each place where the model leaves something.

    A loss that calls the model itself finds what that call has left, and may read it.

    Raises:
        ValueError: the loss fails, so that it reads what lies there.
    """
    places = list(places)
    kept = [(home, home.copy()) for home in {id(home): home for home, _ in places}.values()]
    try:
        if not _fails_or_calls(model, run):
            for home, key in places:
                _put_back(kept)
                home[key] = object()
                if _fails_or_calls(model, run):
                    raise ValueError(
                        f"the loss reads {key!r}, which the model's forward pass or a hook leaves behind. The model is "
                        "not run again for each batch, so that this would be of another one. Let forward return it "
                        "beside the outputs, for instance joined to them, and split them in the loss"
                    )
    finally:
        _put_back(kept)


def _fails_or_calls(model: nn.Module, run: Callable[[], Any]) -> bool:
    """Says whether a loss fails, of which the computation itself says what is wrong, or calls a part of the model."""
    own, called = {id(module) for module in model.modules()}, []
    watch = register_module_forward_pre_hook(lambda module, inputs: called.append(id(module)))
    try:
        run()
    except Exception:
        return True
    finally:
        watch.remove()
    return not own.isdisjoint(called)


def _put_back(kept: Iterable[tuple[Any, Any]]) -> None:
    """Gives dictionaries and lists what they held."""
    for home, held in kept:
        if isinstance(home, list):
            home[:] = held
        else:
            for key in home.keys() - held.keys():
                del home[key]
            home.update(held)


def _holders(called: Any) -> dict[int, Any]:
    """Returns the dictionaries and lists that a function can reach, and the attributes of such objects."""
    held = [called.__self__ if isinstance(called, MethodType) else called]
    held += called.args if isinstance(called, partial) else ()
    for function in functions_in(called):
        loaded, _ = names_in(function.__code__)
        held += [*contents(function), *(function.__globals__.get(name) for name in loaded)]
        held += function.__defaults__ or ()
    found: dict[int, Any] = {}
    for value in held:
        own = not isinstance(value, type | nn.Module) and not is_foreign(type(value))
        holder = vars(value) if own and hasattr(value, "__dict__") else value
        if isinstance(holder, dict | list):
            found[id(holder)] = holder
    return found
