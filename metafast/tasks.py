"""Defines the batch of tasks, which is all that passes from the episodes to the learners, and its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node


@dataclass(frozen=True, eq=False)
class Samples:
    """Holds the samples of T tasks as several tensors ``[T, n, ...]``, and behaves as one tensor ``[T, n]`` of them.

    Attributes:
        parts: the tensors, in the order in which the model takes them.
        names: the arguments of the model that they are; ``None``: they are given in their order.
    """

    parts: tuple[Tensor, ...]
    names: tuple[str, ...] | None = None

    @property
    def by_name(self) -> dict[str, Tensor]:
        """Returns them by the names of the arguments; it is empty where they are given in their order."""
        return dict(zip(self.names or (), self.parts, strict=bool(self.names)))

    @property
    def shape(self) -> torch.Size:
        """Returns ``[T, n]``."""
        return self.parts[0].shape[:2]

    @property
    def device(self) -> torch.device:
        """Returns the device of the first tensor."""
        return self.parts[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the first tensor that has real numbers, or else that of the first."""
        real = [part for part in self.parts if part.is_floating_point()]
        return (real or self.parts)[0].dtype

    @property
    def requires_grad(self) -> bool:
        """Says whether any of them requires a gradient."""
        return any(part.requires_grad for part in self.parts)

    @property
    def is_cuda(self) -> bool:
        """Says whether they are on a GPU."""
        return self.parts[0].is_cuda

    @property
    def nbytes(self) -> int:
        """Counts the bytes of all of them."""
        return sum(part.nbytes for part in self.parts)

    def in_order(self, names: tuple[str, ...] | None) -> Samples:
        """Returns the same with the tensors in the order of ``names``, where these are their names."""
        if self.names is None or names is None or set(self.names) != set(names):
            return self
        return Samples(tuple(self.by_name[name] for name in names), names)

    def dim(self) -> int:
        """Returns 2: the axes of tasks and samples."""
        return 2

    def element_size(self) -> int:
        """Returns the bytes of one number."""
        return self.parts[0].element_size()

    def is_floating_point(self) -> bool:
        """Says whether any of them has real numbers."""
        return self.dtype.is_floating_point

    def each(self, function: Callable[[Tensor], Tensor]) -> Samples:
        """Returns what ``function`` makes of each of them."""
        return Samples(tuple(map(function, self.parts)), self.names)

    def to(self, *args: Any, **kwargs: Any) -> Samples:
        """Moves each of them as ``Tensor.to`` does; integers stay integers."""
        return self.each(lambda part: moved(part, *args, **kwargs))

    def detach(self) -> Samples:
        """Detaches each of them."""
        return self.each(Tensor.detach)

    def contiguous(self) -> Samples:
        """Puts each of them into contiguous memory."""
        return self.each(Tensor.contiguous)

    def __getitem__(self, chosen: Any) -> Any:
        """Returns the argument of that name, or a range of the tasks."""
        if isinstance(chosen, str):
            return self.by_name[chosen]
        return self.each(lambda part: part[chosen])


register_pytree_node(Samples, lambda s: (list(s.parts), s.names), lambda parts, names: Samples(tuple(parts), names))


def as_samples(x: Any) -> Any:
    """Returns a tuple, list or dict of tensors as ``Samples``, and everything else as it is."""
    if isinstance(x, Mapping):
        return Samples(tuple(x.values()), tuple(map(str, x)))
    return Samples(tuple(x)) if isinstance(x, tuple | list) and not isinstance(x, Samples) else x


def parts_of(x: Any) -> list[Tensor]:
    """Lists the tensors that samples consist of."""
    return list(x.parts) if isinstance(x, Samples) else [x]


def each_part(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Returns what ``function`` makes of samples, or of each tensor that they consist of."""
    return x.each(function) if isinstance(x, Samples) else function(x)


def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Moves a tensor as ``Tensor.to`` does, but for integers, which stay integers."""
    target = tensor.to(*args, **kwargs)
    keeps_dtype = not tensor.is_floating_point() and target.is_floating_point()
    return tensor.to(target.device) if keeps_dtype else target


class Batch(NamedTuple):
    """Holds n samples of each of T tasks.

    Attributes:
        x: the inputs ``[T, n, ...]``: a tensor, or ``Samples``.
        y: the targets: class indices ``[T, n]`` or values ``[T, n, ...]``.
        mask: bool ``[T, n]``, true where a sample counts and false where it is padding; ``None`` where all count.
        seeds: int64 ``[T]``, from which the random numbers of a model follow; ``None`` where it draws none.
        each_step: whether every inner step has samples of its own: x, y and mask then begin with an axis of S steps.
    """

    x: Any
    y: Tensor
    mask: Tensor | None = None
    seeds: Tensor | None = None
    each_step: bool = False

    def tasks(self, chosen: slice) -> Batch:
        """Returns the samples of a range of tasks."""
        index: Any = (slice(None), chosen) if self.each_step else chosen
        mask = None if self.mask is None else self.mask[index]
        seeds = None if self.seeds is None else self.seeds[chosen]
        return Batch(self.x[index], self.y[index], mask, seeds, self.each_step)

    def at(self, step: int) -> Batch:
        """Returns the samples of one inner step, counted from the first that there are samples for."""
        if not self.each_step:
            return self
        return Batch(self.x[step], self.y[step], None if self.mask is None else self.mask[step], self.seeds)

    def steps(self, begin: int, end: int) -> Batch:
        """Returns the samples of the steps ``begin .. end - 1``."""
        if not self.each_step:
            return self
        chosen = slice(begin, end)
        mask = None if self.mask is None else self.mask[chosen]
        return Batch(self.x[chosen], self.y[chosen], mask, self.seeds, True)


class TaskShapes(NamedTuple):
    """Holds all that decides how a batch of tasks is computed: batches with equal shapes are computed alike.

    Attributes:
        support_x: the shape of ``TaskBatch.support_x``, of one step where each has samples of its own.
        support_y: the shape of ``TaskBatch.support_y``, likewise.
        query_x: the shape of ``TaskBatch.query_x``.
        query_y: the shape of ``TaskBatch.query_y``.
        dtypes: the dtypes of these four tensors, in this order.
        devices: the devices of the support sets and of the query sets.
        ragged: whether there are masks, so that some samples are padding.
        parts: shape and dtype of each tensor of samples that consist of several; empty where they are one tensor.
        step_sets: the number of steps that have samples of their own; 0 where all steps take the same.
    """

    support_x: torch.Size
    support_y: torch.Size
    query_x: torch.Size
    query_y: torch.Size
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]
    devices: tuple[torch.device, torch.device]
    ragged: bool
    parts: tuple[tuple[torch.Size, torch.dtype], ...] = ()
    step_sets: int = 0

    @classmethod
    def of_samples(cls, x: Tensor) -> TaskShapes:
        """Returns the shapes of tasks whose support and query sets are like ``x [T, n, ...]``, with class indices."""
        labels = x.shape[:2]
        integers = torch.int64
        return cls(
            x.shape, labels, x.shape, labels, (x.dtype, integers, x.dtype, integers), (x.device, x.device), False
        )

    @property
    def tasks(self) -> int:
        """Returns the number T of tasks."""
        return self.support_x[0]

    @property
    def samples(self) -> tuple[int, int]:
        """Returns how many samples a task has in its support set and in its query set."""
        return self.support_x[1], self.query_x[1]

    @property
    def sample(self) -> torch.Size:
        """Returns the shape of one sample."""
        return self.support_x[2:]

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the support samples."""
        return self.dtypes[0]

    @property
    def device(self) -> torch.device:
        """Returns the device of the support samples."""
        return self.devices[0]


@dataclass(frozen=True)
class TaskBatch:
    """Holds T tasks, each with a support set to adapt on and a query set that judges the result.

    Args:
        support_x: the inputs ``[T, n, ...]``: a tensor of real numbers or of integers, such as token ids; or several,
            as the model takes them: a tuple, in their order, or a dict, by the names of the arguments.
        support_y: class indices ``[T, n]`` (int64), or regression targets ``[T, n, ...]``.
        query_x: the inputs ``[T, m, ...]``, likewise.
        query_y: class indices ``[T, m]`` (int64), or regression targets ``[T, m, ...]``.
        support_mask: bool ``[T, n]``, false where a sample of a ragged task is padding; ``None`` where all count.
        query_mask: bool ``[T, m]``, likewise for the query sets.
        seeds: int64 ``[T, 2]``, from which all random numbers follow that a model draws for the support and for the
            query set of each task; ``None``: every call of a learner draws them by torch's default generator.
        each_step: whether every inner step has support samples of its own. ``support_x``, ``support_y`` and
            ``support_mask`` then begin with an axis of S steps: ``[S, T, n, ...]``.

    Raises:
        TypeError: something is no tensor, or inputs are pictures of bytes.
        ValueError: an axis is empty or does not match, tensors are on different devices, or a mask is not bool
            ``[T, n]``; the text names the tensor and both shapes.
    """

    support_x: Any
    support_y: Tensor
    query_x: Any
    query_y: Tensor
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None
    seeds: Tensor | None = None
    each_step: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for part in ("support", "query"):
            x = as_samples(getattr(self, f"{part}_x"))
            object.__setattr__(self, f"{part}_x", x)
        if self.each_step:
            _check_steps(self.support_x, self.support_y, self.support_mask)
        every, judging = self.every_support, Batch(self.query_x, self.query_y, self.query_mask)
        for part, batch in (("support", every), ("query", judging)):
            _check_part(part, batch.x, batch.y, batch.mask)
        if self._support_tasks != self.query_x.shape[0]:
            raise ValueError(
                f"support_x has {self._support_tasks} tasks and query_x has {self.query_x.shape[0]}; "
                "the leading axis is the task axis T and must be the same on every tensor"
            )
        if isinstance(self.query_x, Samples) and isinstance(self.support_x, Samples):
            object.__setattr__(self, "query_x", self.query_x.in_order(self.support_x.names))
        names = [getattr(x, "names", None) for x in (self.support_x, self.query_x)]
        if names[0] != names[1]:
            raise ValueError(
                f"support_x has the tensors {names[0]} and query_x {names[1]}; both go through the same model, so "
                "their names must match"
            )
        support, query = ([tuple(p.shape[2:]) for p in parts_of(x)] for x in (every.x, self.query_x))
        if support != query:
            raise ValueError(
                f"a support sample has shape {', '.join(map(str, support))} and a query sample "
                f"{', '.join(map(str, query))}; both go through the same model, so they must match"
            )
        seeds = self.seeds
        if seeds is not None and (seeds.dtype != torch.int64 or seeds.shape != (len(self), 2)):
            raise ValueError(
                f"seeds has dtype {seeds.dtype} and shape {tuple(seeds.shape)}; it must be torch.int64 of shape "
                f"{(len(self), 2)}"
            )

    def __len__(self) -> int:
        return self.query_x.shape[0]

    @property
    def support(self) -> Batch:
        """Returns the support sets."""
        return Batch(self.support_x, self.support_y, self.support_mask, self._seeds(0), self.each_step)

    @property
    def every_support(self) -> Batch:
        """Returns the support sets of all steps as those of ``S * T`` tasks, without seeds."""
        if not self.each_step:
            return Batch(self.support_x, self.support_y, self.support_mask)
        mask = None if self.support_mask is None else self.support_mask.flatten(0, 1)
        return Batch(each_part(lambda x: x.flatten(0, 1), self.support_x), self.support_y.flatten(0, 1), mask)

    @property
    def first_step(self) -> TaskBatch:
        """Returns the batch with the support sets of the first step for all steps."""
        if not self.each_step:
            return self
        x, y, mask, *_ = self.support.at(0)
        return TaskBatch(x, y, self.query_x, self.query_y, mask, self.query_mask, self.seeds)

    @property
    def _support_tasks(self) -> int:
        return self.support_y.shape[1 if self.each_step else 0]

    @property
    def query(self) -> Batch:
        """Returns the query sets."""
        return Batch(self.query_x, self.query_y, self.query_mask, self._seeds(1))

    @property
    def shapes(self) -> TaskShapes:
        """Returns all that decides how this batch is computed."""
        support_x, support_y = self.support_x, self.support_y
        if self.each_step:
            support_x, support_y, *_ = self.support.at(0)
        query_x = self.query_x
        query_y = self.query_y
        ragged = self.support_mask is not None or self.query_mask is not None
        dtypes = (support_x.dtype, support_y.dtype, query_x.dtype, query_y.dtype)
        devices = (support_x.device, query_x.device)
        parts: tuple[tuple[torch.Size, torch.dtype], ...] = ()
        if isinstance(support_x, Samples):
            parts = tuple((part.shape, part.dtype) for x in (support_x, query_x) for part in parts_of(x))
        step_sets = self.support_y.shape[0] if self.each_step else 0
        return TaskShapes(
            support_x.shape, support_y.shape, query_x.shape, query_y.shape, dtypes, devices, ragged, parts, step_sets
        )

    def to(self, *args: object, **kwargs: object) -> TaskBatch:
        """Moves every tensor to a device, or the floating-point ones to a dtype, as ``Tensor.to`` does."""
        found: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Samples):
                found[f.name] = value.to(*args, **kwargs)
            elif isinstance(value, Tensor):
                found[f.name] = moved(value, *args, **kwargs)
        return TaskBatch(**found, each_step=self.each_step)

    def _seeds(self, part: int) -> Tensor | None:
        return None if self.seeds is None else self.seeds[:, part]

    def tasks(self, chosen: slice) -> TaskBatch:
        """Returns a range of the tasks."""
        support, query = self.support.tasks(chosen), self.query.tasks(chosen)
        seeds = None if self.seeds is None else self.seeds[chosen]
        of_sets = support.x, support.y, query.x, query.y, support.mask, query.mask
        return TaskBatch(*of_sets, seeds, each_step=self.each_step)


def _check_steps(x: Any, y: Tensor, mask: Tensor | None) -> None:
    """Checks that support sets begin with the axis of steps."""
    tensors = [*parts_of(x), y, *([] if mask is None else [mask])]
    others = [type(t).__name__ for t in tensors if not isinstance(t, Tensor)]
    if others:
        raise TypeError(
            f"each_step=True: a {others[0]} is among the support tensors; pass torch.Tensors [S, T, n, ...]"
        )
    shapes = [list(t.shape) for t in tensors]
    if any(len(shape) < 3 for shape in shapes) or len({tuple(shape[:3]) for shape in shapes}) > 1 or 0 in shapes[0][:1]:
        raise ValueError(
            f"each_step=True: the support tensors have shapes {', '.join(map(str, shapes))}; all of them must begin "
            "with the same axes [S, T, n]: the inner steps, the tasks, and the samples that a task has at a step"
        )


def _check_part(part: str, x: Any, y: Tensor, mask: Tensor | None) -> None:
    """Checks the tensors of the support sets or of the query sets (``part``) against one another."""
    several = isinstance(x, Samples)
    if several and not x.parts:
        raise ValueError(f"{part}_x is empty: it needs at least one tensor")
    names = [f"{part}_x[{name!r}]" for name in (x.names or range(len(x.parts)))] if several else [f"{part}_x"]
    for name, value in (*zip(names, parts_of(x), strict=True), (f"{part}_y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; pass a torch.Tensor (torch.as_tensor makes one)")
        if value.layout is not torch.strided:
            raise TypeError(f"{name} is sparse; use {name}.to_dense()")
        if value.dim() < 2:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it needs the task axis T and the sample axis n first "
                "(for a single task use x[None])"
            )
        if 0 in value.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: an empty batch; every task needs at least one sample"
            )
    for name, value in zip(names, parts_of(x), strict=True):
        if value.dtype == torch.uint8:
            raise TypeError(
                f"{name} has dtype {value.dtype}; pictures must be floating point (use x.float() / 255), and token ids "
                "int64 (x.long())"
            )
        if value.is_complex():
            raise TypeError(f"{name} has dtype {value.dtype}; samples must be floating point, or whole numbers")
        if value.shape[:2] != x.shape[:2] or value.device != x.device:
            raise ValueError(
                f"{names[0]} is [T, n] = {list(x.shape[:2])} on {x.device} and {name} {list(value.shape[:2])} on "
                f"{value.device}; all tensors of the samples must agree"
            )
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"{part}_x has [T, n] = {list(x.shape[:2])} and {part}_y has {list(y.shape[:2])}; they must agree"
        )
    if x.device != y.device:
        raise ValueError(f"{part}_x is on {x.device} and {part}_y on {y.device}; move both with tasks.to(device)")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"{part}_mask is a {type(mask).__name__}; pass a torch.Tensor of dtype torch.bool")
        if mask.device != x.device:
            raise ValueError(
                f"{part}_x is on {x.device} and {part}_mask on {mask.device}; move both with tasks.to(device)"
            )
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(
                f"{part}_mask has dtype {mask.dtype} and shape {tuple(mask.shape)}; "
                f"it must be torch.bool of shape {tuple(x.shape[:2])}"
            )
        if not bool(mask.any(dim=1).all()):
            raise ValueError(f"{part}_mask leaves a task without a single sample; every task needs at least one")


def each_stacked(batches: Any) -> Any:
    """Stacks samples of the same kind, each a tensor or ``Samples``, along a new first axis."""
    first = batches[0]
    if not isinstance(first, Samples):
        return torch.stack(batches)
    parts = zip(*(batch.parts for batch in batches), strict=True)
    return Samples(tuple(torch.stack(part) for part in parts), first.names)
