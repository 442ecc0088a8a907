"""Says which operations no Program can hold, because what they do differs from task to task or from run to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metafast.program.operation import CaptureError, Ref, refs_in
from metafast.program.user_lines import is_within

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


def remedy_of_reading() -> str:
    """Says what to do where Python reads a value of the data."""
    if is_within("distributions"):
        return "torch.distributions checks its arguments, which each task has of its own: pass validate_args=False"
    return (
        "It may not branch or loop on such values, nor turn them into numbers: each task has its own. Use torch.where, "
        "or decide by what is known before the data comes"
    )


def value_reader(func: Any) -> str:
    """Says in words how ``func`` reads values."""
    name = func.overloadpacket.__name__
    return _READERS.get(name, f"torch.{name}")


def selects(func: Any, args: Any, is_data: Callable[[Ref], bool], dtype: Callable[[Ref], torch.dtype]) -> bool:
    """Says whether the shape that ``func`` makes follows from values of the data."""
    if func.overloadpacket is aten.linalg_lstsq:
        return False
    if func.overloadpacket is aten.masked_select:
        return is_data(args[1])
    if func.overloadpacket is aten.one_hot:
        return len(args) < 2 or args[1] < 0
    if func.overloadpacket is aten.index:
        return any(is_data(ref) and dtype(ref) in (torch.bool, torch.uint8) for ref in refs_in(args[1]))
    return any(map(is_data, refs_in(args)))


def refuse_draw(func: Any, kwargs: Any, how: tuple[bool, bool], refuse: Callable[[str, str], Exception]) -> None:
    """Raises what ``refuse`` makes where a call that draws random numbers has no place in a Program.

    ``how`` says whether the numbers can be taken from a counter, and whether the model has set torch's generator.
    """
    known, seeded = how
    name = func.overloadpacket.__name__
    if not known:
        raise refuse(
            f"draws random numbers by {name}, which cannot be repeated on the way back",
            "Use dropout, or draw by torch.rand, torch.randn, torch.bernoulli or torch.randint and compute the rest",
        )
    if kwargs.get("generator") is not None:
        raise refuse(
            f"draws random numbers by {name} from a generator of its own",
            "Leave generator= out: each call of a learner draws seeds from torch's default generator",
        )
    if seeded:
        raise refuse(
            f"draws random numbers by {name} after it has set the seed of torch's generator",
            "Leave the seed alone: the numbers follow from those of the batch. Numbers that stay the same belong in a "
            "buffer that __init__ draws",
        )


def failure(model: nn.Module, where: str, inputs: Sequence[Tensor], error: Exception) -> Exception:
    """Says that the module itself failed on its samples, or did what cannot be recorded."""
    name, text = type(model).__name__, str(error).strip().split("\n")[0]
    if "not registered" in text and "mode" in text:
        text = "a control-flow operator of torch. Write it with torch.where, or choose before the data comes"
        return CaptureError(f"{name} uses at {where} {text}")
    if "more than 1 value per channel" in text:
        text += "; bn='frozen' takes the running statistics in its place"
    shapes = ", ".join(str(list(tensor.shape[1:])) for tensor in inputs)
    of_torch = isinstance(error, RuntimeError | IndexError)
    kind = "" if of_torch else f"{type(error).__name__}: "
    remedy = "; check it against the model's layers" if of_torch else ""
    return ValueError(
        f"{name} fails at {where}: {kind}{text or type(error).__name__}. It was called on the {len(inputs[0])} samples "
        f"of one task, which have shape {shapes}{remedy}"
    )
