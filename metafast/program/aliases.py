"""Follows which tensors of a run share memory, so that a change in place becomes a new value.

A tensor is a base, or shows some of the elements of a base. A write to it makes a new value of the base, and whoever
reads another tensor of the same memory later reads elements of that new value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from metafast.program.operation import Constant, Input, Made, Ref, Weight

aten = torch.ops.aten
_LABELS = ("aten::requires_grad_", "aten::detach_")
"""Operations in place that leave the numbers of a tensor as they are."""


@dataclass
class _Known:
    """Holds what is known of one tensor.

    Attributes:
        tensor: it itself, so that its ``id`` stays its own.
        ref: the value that it held when its base had been written to ``version`` times.
        base: the tensor whose memory it shows; itself, where it is a base.
        version: how often the base had been written to.
    """

    tensor: Tensor
    ref: Ref
    base: _Known | None
    version: int = 0


class Aliases:
    """Knows the value of each tensor of a run.

    Args:
        emit: adds an operation to the recording: target, arguments, named arguments, the tensors that it made.
        refuse: makes an error of what the module does and of the remedy.
    """

    def __init__(self, emit: Callable[..., list[Made]], refuse: Callable[[str, str], Exception]) -> None:
        self.emit = emit
        self.refuse = refuse
        self._known: dict[int, _Known] = {}
        self._bases: dict[int, _Known] = {}

    def forget(self) -> None:
        """Lets go of all tensors."""
        self._known.clear()
        self._bases.clear()

    def knows(self, tensor: Tensor) -> bool:
        """Says whether ``tensor`` has been entered."""
        return id(tensor) in self._known

    def shares(self, tensor: Tensor) -> bool:
        """Says whether ``tensor`` lies in memory of one that has been entered."""
        return _memory(tensor) in self._bases

    def is_same(self, ref: Ref, tensor: Tensor) -> bool:
        """Says whether ``tensor`` has the memory and the shape of a tensor that holds ``ref``."""
        base = self._bases.get(_memory(tensor))
        shown = [] if base is None else [base, *(k for k in self._known.values() if k.base is base)]
        return any(
            k.ref == ref and k.tensor.shape == tensor.shape and k.tensor.stride() == tensor.stride() for k in shown
        )

    def enter(self, tensor: Tensor, ref: Ref) -> None:
        """Notes that ``tensor`` holds the value ``ref``."""
        if tensor.layout is not torch.strided:
            raise self.refuse("uses a sparse tensor", "Use .to_dense()")
        base = self._bases.get(_memory(tensor))
        entry = _Known(tensor, ref, base, base.version if base else 0)
        self._known[id(tensor)] = entry
        if base is None:
            self._bases[_memory(tensor)] = entry

    def ref(self, tensor: Tensor) -> Ref:
        """Returns the value that ``tensor`` holds now."""
        entry = self._known.get(id(tensor))
        if entry is None:
            base = self._bases.get(_memory(tensor))
            if base is None:  # it comes from outside of the run: an attribute, a global, or a number made a tensor
                self.enter(tensor, Constant(tensor))
                return self._known[id(tensor)].ref
            # An alias that no operation made, such as ``x.data``: no gradient goes through it.
            self.enter(tensor, self._detached(self._shown(tensor, base), tensor))
            entry = self._known[id(tensor)]
        base = entry.base
        if base is not None and entry.version != base.version:
            entry.ref, entry.version = self._shown(tensor, base), base.version
        return entry.ref

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuses writes that have no place in a Program, before ``func`` writes to its arguments."""
        if func._schema.name not in _LABELS:
            for tensor in written(func, args, kwargs):
                entry = self._known[id(tensor)]
                self._check_write(tensor, entry.base or entry)

    def changed(self, func: Any, args: Any, kwargs: Any, refs: Any, named: Any) -> bool:
        """Notes what ``func`` has written to its arguments, as a call of the operator that makes new tensors.

        It returns whether there was such a write.
        """
        changed = written(func, args, kwargs)
        if not changed:
            return False
        if func._schema.name in _LABELS:
            return self._detached_in_place(func, changed[0])
        if len(changed) > 1:
            raise self.refuse(f"changes several tensors at once by {func}", "Use operations that return new tensors")
        self._write(changed[0], func, refs, named)
        return True

    def _write(self, tensor: Tensor, func: Any, refs: Any, named: Any) -> None:
        """Gives ``tensor`` the value that ``func`` would have returned in the place of writing it."""
        entry = self._known[id(tensor)]
        base = entry.base or entry
        name = func._schema.name.split("::")[-1]
        if name == "copy_":
            value = self._copied(refs[1], tensor)
        else:
            target, refs, named = _without_writing(func, refs, named, self.refuse)
            value = self.emit(target, refs, named, [tensor])[0]
        entry.ref = value
        if base is not entry:
            base.ref = self._put(value, tensor, base)
        base.version += 1
        entry.version = base.version

    def _check_write(self, tensor: Tensor, base: _Known) -> None:
        """Refuses writes that have no place in a Program."""
        if isinstance(base.ref, Weight):
            raise self.refuse(
                f"changes its parameter {base.ref.name!r} in place",
                "Parameters are the inner loop's to move; compute a new tensor from it, or use "
                "torch.nn.utils.parametrize",
            )
        if isinstance(base.ref, Input):
            raise self.refuse("changes its input in place", "Use the out-of-place form (x = x + y), or x = x.clone()")
        if not torch.is_grad_enabled() and tensor.requires_grad:
            raise self.refuse(
                "changes a tensor in place under torch.no_grad() that carries a gradient",
                "Its gradient would not fit its value; use the out-of-place form",
            )

    def _copied(self, source: Ref, tensor: Tensor) -> Ref:
        """Returns ``source`` in the dtype and the shape of ``tensor``."""
        cast = self.emit(aten._to_copy.default, (source,), {"dtype": tensor.dtype}, [tensor])[0]
        return self.emit(aten.expand.default, (cast, list(tensor.shape)), {}, [tensor])[0]

    def _put(self, value: Ref, tensor: Tensor, base: _Known) -> Ref:
        """Returns the base's value with ``value`` at the places that ``tensor`` shows."""
        self._check_view(tensor)
        if tensor.is_complex() and not base.tensor.is_complex():
            return self._put(self._pairs(value, tensor), torch.view_as_real(tensor), base)
        if base.tensor.is_complex() and not tensor.is_complex():
            pairs = self._put(value, tensor, self._as_pairs(base))
            return self.emit(aten.view_as_complex.default, (pairs,), {}, [base.tensor])[0]
        at = _places(tensor, base.tensor)
        if at.numel() == base.tensor.numel() and torch.equal(at.flatten(), torch.arange(at.numel(), device=at.device)):
            return self.emit(aten.reshape.default, (value, list(base.tensor.shape)), {}, [base.tensor])[0]
        if at.unique().numel() != at.numel():
            raise self.refuse("changes an expanded tensor in place", "Use .clone() before")
        flat = self.emit(aten.reshape.default, (base.ref, [-1]), {}, [base.tensor.flatten()])[0]
        put = self.emit(aten.index_put.default, (flat, [Constant(at)], value), {}, [base.tensor.flatten()])[0]
        return self.emit(aten.reshape.default, (put, list(base.tensor.shape)), {}, [base.tensor])[0]

    def _shown(self, tensor: Tensor, base: _Known) -> Ref:
        """Returns the elements of the base's value that ``tensor`` shows."""
        self._check_view(tensor)
        if tensor.is_complex() and not base.tensor.is_complex():
            pairs = self._shown(torch.view_as_real(tensor), base)
            return self.emit(aten.view_as_complex.default, (pairs,), {}, [tensor])[0]
        if base.tensor.is_complex() and not tensor.is_complex():
            return self._shown(tensor, self._as_pairs(base))
        at = _places(tensor, base.tensor)
        whole = at.shape == base.tensor.shape
        if whole and torch.equal(at.flatten(), torch.arange(at.numel(), device=at.device)):
            return base.ref
        flat = self.emit(aten.reshape.default, (base.ref, [-1]), {}, [base.tensor.flatten()])[0]
        return self.emit(aten.index.Tensor, (flat, [Constant(at)]), {}, [tensor])[0]

    def _check_view(self, tensor: Tensor) -> None:
        """Refuses views whose numbers are not those that lie in memory."""
        if tensor.is_conj() or tensor.is_neg():
            raise self.refuse("changes a tensor in place that .conj() shows too", "Use .conj_physical(), a copy")

    def _as_pairs(self, base: _Known) -> _Known:
        """Returns a base of complex numbers as one of real numbers, with a further axis of two."""
        return _Known(torch.view_as_real(base.tensor), self._pairs(base.ref, base.tensor), None)

    def _pairs(self, value: Ref, tensor: Tensor) -> Ref:
        return self.emit(aten.view_as_real.default, (value,), {}, [torch.view_as_real(tensor)])[0]

    def _detached(self, ref: Ref, tensor: Tensor) -> Ref:
        return self.emit(aten.detach.default, (ref,), {}, [tensor])[0]

    def _detached_in_place(self, func: Any, tensor: Tensor) -> bool:
        """Notes ``detach_``: later reads of the tensor carry no gradient. ``requires_grad_`` changes no value."""
        entry = self._known[id(tensor)]
        if func._schema.name == "aten::detach_" and not isinstance(entry.ref, Constant):
            entry.ref = self._detached(entry.ref, tensor)
        return True


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _places(tensor: Tensor, base: Tensor) -> Tensor:
    """Returns, for each element of ``tensor``, its place in ``base.flatten()``."""
    size = base.untyped_storage().nbytes() // base.element_size()
    memory = torch.arange(size, device=base.device)
    place = torch.empty_like(memory)
    shown = memory.as_strided(base.shape, base.stride(), base.storage_offset())
    place[shown.flatten()] = torch.arange(base.numel(), device=base.device)
    return place[memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())]


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Lists the arguments that ``func`` writes to."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            tree_map_only(Tensor, found.append, value)
    return found


def _without_writing(func: Any, refs: Any, named: Any, refuse: Any) -> tuple[Any, Any, Any]:
    """Returns the operator that computes what ``func`` writes, and the arguments to call it with."""
    name = func._schema.name.split("::")[-1]
    outs = [argument.name for argument in func._schema.arguments if argument.is_out]
    if name == "zero_":
        return aten.zeros_like.default, refs, named
    if outs:
        named = {key: value for key, value in named.items() if key not in outs}
        wanted = [a.name for a in func._schema.arguments if not a.is_out]
        packet = func.overloadpacket
        for overload in packet.overloads():
            candidate = getattr(packet, overload)
            if [a.name for a in candidate._schema.arguments] == wanted and not candidate._schema.is_mutable:
                return candidate, refs, named
    else:
        plain = f"__{name[3:-2]}__" if name.startswith("__i") else name.removesuffix("_")
        packet = getattr(getattr(torch.ops, func.namespace), plain, None)
        if packet is not None and func._overloadname in packet.overloads():
            return getattr(packet, func._overloadname), refs, named
    raise refuse(f"changes a tensor in place by {name}", "Use an operation that returns a new tensor")
