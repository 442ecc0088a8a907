"""Runs a module as its user would, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from metafast.program.operation import CaptureError
from metafast.tasks import Samples


def call(model: nn.Module, x: Any) -> Any:
    """Calls the model; samples of several tensors are its arguments."""
    if not isinstance(x, Samples):
        return model(x)
    return model(*x.parts) if x.names is None else model(**x.by_name)


def picked(returned: Any, part: str | int | None, model: nn.Module) -> Tensor:
    """Returns the one tensor that counts of what the module returned."""
    name = type(model).__name__
    if part is not None:
        try:
            if isinstance(returned, Tensor):
                raise KeyError(part)
            named = isinstance(part, str) and not isinstance(returned, Mapping)
            returned = getattr(returned, str(part)) if named else returned[part]
        except (KeyError, IndexError, TypeError, AttributeError):
            known = sorted(returned) if isinstance(returned, Mapping) else f"a {type(returned).__name__}"
            raise CaptureError(f"output={part!r}: {name}.forward returns {known}, which has no such part") from None
    if not isinstance(returned, Tensor):
        what = f"a {type(returned).__name__}" if returned is not None else "None"
        parts = f" of {sorted(map(str, returned))}" if isinstance(returned, Mapping) else ""
        raise CaptureError(
            f"{name}.forward returns {what}{parts}; it must return one tensor: say which part counts by output=, a "
            "name or a number"
        )
    return returned


class unchanged:
    """Puts a module back to what it was when the ``with`` block is left, also by an error.

    Its parameters are those that it had, with the memory that they had; nothing writes to that. Buffers, attributes and
    modes are what they were.
    """

    def __init__(self, model: nn.Module, ignored: Collection[Tensor] = ()) -> None:
        self.model = model
        self.ignored = {id(buffer) for buffer in ignored}
        self.parameters = [(name, p, p.data) for name, p in model.named_parameters()]
        self.buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
        modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        owners: list[dict[str, Any]] = [m._parameters for m in modules]
        self.owners = [(owner, dict(owner)) for owner in owners]
        self.homes = [m.__dict__ for m in modules]
        self.attributes = [dict(home) for home in self.homes]
        self.registries = [m._buffers for m in modules]
        self.registered = [dict(registry) for registry in self.registries]
        held = [value for home in self.attributes for name, value in home.items() if not name.startswith("_")]
        self.containers = [(value, value.copy()) for value in held if type(value) in (list, dict, set)]

    def __enter__(self) -> unchanged:
        return self

    def changed(self) -> bool:
        """Says whether the module is not as it was."""
        return (
            any(_written(*then) and id(then[0]) not in self.ignored for then in self.buffers)
            or any(_differ(now, then) for now, then in zip(self.registries, self.registered, strict=True))
            or any(_differ(now, then) for now, then in zip(self.homes, self.attributes, strict=True))
            or any(_holds_others(now, then) for now, then in self.containers)
        )

    def assigned(self, read: Collection[int]) -> frozenset[tuple[int, str]]:
        """Returns the attributes that have been set to something that is no plain value.

        What held a tensor that was ``read``, by its ``id``, is left out, since the next call reads another one, and so
        are lists and dictionaries, which Python may have read.
        """
        pairs = zip(self.homes, self.attributes, strict=True)
        return frozenset(
            (id(now), name)
            for now, then in pairs
            for name, value in now.items()
            if then.get(name, pairs) is not value and not isinstance(value, _PLAIN)
            if id(then.get(name)) not in read and not isinstance(then.get(name), list | tuple | dict | set)
        )

    def check_parameters(self) -> None:
        """Refuses parameters whose ``.data`` the run has replaced.

        Raises:
            CaptureError: there was one.
        """
        for name, parameter, data in self.parameters:
            if _is_elsewhere(parameter, data):
                raise CaptureError(
                    f"{type(self.model).__name__} replaces the .data of its parameter {name!r} in its forward pass. "
                    "Parameters are the inner loop's to move; compute a new tensor from it, or use "
                    "torch.nn.utils.parametrize"
                )

    def __exit__(self, *error: object) -> None:
        for _, parameter, data in self.parameters:
            if _is_elsewhere(parameter, data):
                parameter.data = data
        with torch.no_grad():
            for buffer, version, value in self.buffers:
                if _written(buffer, version, value):
                    buffer.copy_(value)
        for container, held in self.containers:
            if _holds_others(container, held):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(held)
        for live, kept in [*self.owners, *zip(self.registries, self.registered, strict=True),
                           *zip(self.homes, self.attributes, strict=True)]:  # fmt: skip
            if _differ(live, kept):
                live.clear()
                live.update(kept)


_PLAIN = (bool, int, float, str, type(None))


def _is_elsewhere(parameter: Tensor, data: Tensor) -> bool:
    """Says whether a parameter no longer shows the memory that it showed."""
    return any(getattr(parameter, what)() != getattr(data, what)() for what in ("data_ptr", "size", "stride"))


def _written(buffer: Tensor, version: int, value: Tensor) -> bool:
    """Says whether a buffer has been written to; torch's batch norm writes without counting a version."""
    return buffer._version != version or not torch.equal(buffer, value)


def _holds_others(now: Any, then: Any) -> bool:
    """Says whether a list, dict or set holds other objects than it held."""
    if isinstance(now, dict):
        return _differ(now, then)
    return len(now) != len(then) or any(map(is_not, now, then))


def _differ(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Says whether any attribute is another object than it was."""
    return len(now) != len(then) or any(now.get(name, now) is not value for name, value in then.items())
