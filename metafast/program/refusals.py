"""Says which operations no Program can hold, because what they do differs from run to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
READS_VALUES = (aten.item.default, aten.is_nonzero.default, aten._local_scalar_dense.default, aten.equal.default,
                aten.allclose.default)  # fmt: skip
"""Operations that tell Python a value of a tensor."""
_READERS = {
    "item": "a number (.item(), float(), int() or a loop)",
    "is_nonzero": "a branch (if, while, and, or, bool())",
}
DROPOUT = {aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout, aten.native_dropout,
            aten.dropout_, aten.feature_dropout_, aten.alpha_dropout_, aten.feature_alpha_dropout_}  # fmt: skip
PASSING_ON = {aten.contiguous, aten.to, aten.alias, aten.lift_fresh, aten.expand, aten.expand_as, aten.view,
              aten.reshape, aten.flatten, aten.squeeze}  # fmt: skip
"""Operations that may return their input as it is."""
_RATES = {"dropout_p", "dropout"}


def value_reader(func: Any) -> str:
    """Says in words how ``func`` reads values."""
    name = func.overloadpacket.__name__
    return _READERS.get(name, f"torch.{name}")


def refuse_random(func: Any, args: Any, kwargs: Any, refuse: Callable[[str, str], Exception]) -> None:
    """Raises what ``refuse`` makes where ``func`` draws random numbers."""
    packet = func.overloadpacket
    if packet in DROPOUT:
        p, training = (*args[1:], *kwargs.values())[:2]
        drawing = bool(training) and p > 0
    else:
        drawing = torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs)
    if drawing:
        raise refuse(
            "draws random numbers",
            "Dropout in training mode and other noise have no exact meta-gradient; call model.eval() on it, or take it "
            "out",
        )


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Says whether a call that can draw does: attention and recurrent layers draw where they drop something."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    rates = [named[name] for name in _RATES if name in named]
    if rates:
        return bool(named.get("train", named.get("training", True))) and any(rate > 0 for rate in rates)
    if any(a.name in _RATES for a in func._schema.arguments):
        return False
    return bool(named.get("training", True))
