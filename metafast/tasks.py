"""Defines the batch of tasks, which is all that passes from the episodes to the learners."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Holds n samples of each of T tasks.

    Attributes:
        x: the inputs ``[T, n, ...]``.
        y: the targets: class indices ``[T, n]`` or values ``[T, n, ...]``.
        mask: bool ``[T, n]``, true where a sample counts and false where it is padding; ``None`` where all count.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None

    def tasks(self, chosen: slice) -> Batch:
        """Returns the samples of a range of tasks."""
        return Batch(self.x[chosen], self.y[chosen], None if self.mask is None else self.mask[chosen])


class TaskShapes(NamedTuple):
    """Holds all that decides how a batch of tasks is computed: batches with equal shapes are computed alike.

    Attributes:
        support_x: the shape of ``TaskBatch.support_x``.
        support_y: the shape of ``TaskBatch.support_y``.
        query_x: the shape of ``TaskBatch.query_x``.
        query_y: the shape of ``TaskBatch.query_y``.
        dtypes: the dtypes of these four tensors, in this order.
        devices: the devices of the support sets and of the query sets.
        ragged: whether there are masks, so that some samples are padding.
    """

    support_x: torch.Size
    support_y: torch.Size
    query_x: torch.Size
    query_y: torch.Size
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]
    devices: tuple[torch.device, torch.device]
    ragged: bool

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
        support_x: the inputs ``[T, n, ...]``, floating point.
        support_y: class indices ``[T, n]`` (int64), or regression targets ``[T, n, ...]``.
        query_x: the inputs ``[T, m, ...]``, floating point.
        query_y: class indices ``[T, m]`` (int64), or regression targets ``[T, m, ...]``.
        support_mask: bool ``[T, n]``, false where a sample of a ragged task is padding; ``None`` where all count.
        query_mask: bool ``[T, m]``, likewise for the query sets.

    Raises:
        TypeError: something is no tensor, or inputs are not floating point.
        ValueError: an axis is empty or does not match, tensors are on different devices, or a mask is not bool
            ``[T, n]``; the text names the tensor and both shapes.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None

    def __post_init__(self) -> None:
        for part in ("support", "query"):
            _check_part(part, getattr(self, f"{part}_x"), getattr(self, f"{part}_y"), getattr(self, f"{part}_mask"))
        if self.support_x.shape[0] != self.query_x.shape[0]:
            raise ValueError(
                f"support_x has {self.support_x.shape[0]} tasks and query_x has {self.query_x.shape[0]}; "
                "the leading axis is the task axis T and must be the same on every tensor"
            )
        if self.support_x.shape[2:] != self.query_x.shape[2:]:
            raise ValueError(
                f"a support sample has shape {tuple(self.support_x.shape[2:])} and a query sample "
                f"{tuple(self.query_x.shape[2:])}; both go through the same model, so they must match"
            )

    def __len__(self) -> int:
        return self.support_x.shape[0]

    @property
    def support(self) -> Batch:
        """Returns the support sets."""
        return Batch(self.support_x, self.support_y, self.support_mask)

    @property
    def query(self) -> Batch:
        """Returns the query sets."""
        return Batch(self.query_x, self.query_y, self.query_mask)

    @property
    def shapes(self) -> TaskShapes:
        """Returns all that decides how this batch is computed."""
        support_x = self.support_x
        support_y = self.support_y
        query_x = self.query_x
        query_y = self.query_y
        ragged = self.support_mask is not None or self.query_mask is not None
        dtypes = (support_x.dtype, support_y.dtype, query_x.dtype, query_y.dtype)
        devices = (support_x.device, query_x.device)
        return TaskShapes(support_x.shape, support_y.shape, query_x.shape, query_y.shape, dtypes, devices, ragged)

    def to(self, *args: object, **kwargs: object) -> TaskBatch:
        """Moves every tensor to a device, or the floating-point ones to a dtype, as ``Tensor.to`` does."""
        moved = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None:
                continue
            target = value.to(*args, **kwargs)
            keeps_dtype = not value.is_floating_point() and target.is_floating_point()
            moved[f.name] = value.to(target.device) if keeps_dtype else target
        return TaskBatch(**moved)

    def tasks(self, chosen: slice) -> TaskBatch:
        """Returns a range of the tasks."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return TaskBatch(**{name: value[chosen] for name, value in parts.items() if value is not None})


def _check_part(part: str, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
    """Checks the tensors of the support sets or of the query sets (``part``) against one another."""
    for name, value in ((f"{part}_x", x), (f"{part}_y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; pass a torch.Tensor (torch.as_tensor makes one)")
        if value.dim() < 2:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it needs the task axis T and the sample axis n first "
                "(for a single task use x[None])"
            )
        if 0 in value.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: an empty batch; every task needs at least one sample"
            )
    if not x.is_floating_point():
        raise TypeError(f"{part}_x has dtype {x.dtype}; the model's input must be floating point (use x.float() / 255)")
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
