"""TaskBatch: the one thing that crosses from episodes into learners."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Samples of T tasks: ``x [T, n, ...]``, ``y [T, n]`` or ``[T, n, ...]``, ``mask [T, n]`` true where one counts."""

    x: Tensor
    y: Tensor
    mask: Tensor | None = None

    def tasks(self, chosen: slice) -> Batch:
        """The same for a range of tasks."""
        return Batch(self.x[chosen], self.y[chosen], None if self.mask is None else self.mask[chosen])


class TaskShapes(NamedTuple):
    """All that decides how a batch of tasks is computed: two batches with equal shapes are of one kind.

    Shapes are those of the tensors of a ``TaskBatch``; ``dtypes`` and ``devices`` stand in the order of the first four
    fields; ``ragged`` says whether some samples are padding.
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
        """Those of tasks whose support and query sets are like ``x [T, n, ...]``, with class indices for targets."""
        labels, integers = x.shape[:2], torch.int64
        return cls(
            x.shape, labels, x.shape, labels, (x.dtype, integers, x.dtype, integers), (x.device, x.device), False
        )

    @property
    def tasks(self) -> int:
        """T."""
        return self.support_x[0]

    @property
    def samples(self) -> tuple[int, int]:
        """Samples in a task's support set and in its query set."""
        return self.support_x[1], self.query_x[1]

    @property
    def sample(self) -> torch.Size:
        """The shape of one sample."""
        return self.support_x[2:]

    @property
    def dtype(self) -> torch.dtype:
        """That of the samples."""
        return self.dtypes[0]

    @property
    def device(self) -> torch.device:
        """That of the samples."""
        return self.devices[0]


@dataclass(frozen=True)
class TaskBatch:
    """T tasks, each with a support set to adapt on and a query set to be judged on.

    Args:
        support_x: ``[T, n, ...]`` floating point.
        support_y: ``[T, n]`` class indices (int64), or ``[T, n, ...]`` regression targets.
        query_x: ``[T, m, ...]``.
        query_y: ``[T, m]`` or ``[T, m, ...]``.
        support_mask: optional bool ``[T, n]``; samples that are false are padding (ragged tasks).
        query_mask: optional bool ``[T, m]``.

    Raises:
        ValueError: an axis is empty or does not match; the text names the tensor and both shapes.
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
        """The support set as a batch."""
        return Batch(self.support_x, self.support_y, self.support_mask)

    @property
    def query(self) -> Batch:
        """The query set as a batch."""
        return Batch(self.query_x, self.query_y, self.query_mask)

    @property
    def shapes(self) -> TaskShapes:
        """What decides how this batch is computed."""
        x, y, q, z = self.support_x, self.support_y, self.query_x, self.query_y
        ragged = self.support_mask is not None or self.query_mask is not None
        dtypes, devices = (x.dtype, y.dtype, q.dtype, z.dtype), (x.device, q.device)
        return TaskShapes(x.shape, y.shape, q.shape, z.shape, dtypes, devices, ragged)

    def to(self, *args: object, **kwargs: object) -> TaskBatch:
        """Moves every tensor to a device, or floating-point ones to a dtype, as ``Tensor.to`` does."""
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
        """The same for a range of tasks."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return TaskBatch(**{name: value[chosen] for name, value in parts.items() if value is not None})


def _check_part(part: str, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
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
