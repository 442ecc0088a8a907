"""How much each sample counts in the mean of its task."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_weights(mask: Tensor | None, outputs: Tensor) -> Tensor:
    """``[T, n]``: one over the number of samples of the task, zero for padding."""
    if mask is None:
        return torch.full(outputs.shape[:2], 1.0 / outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    kept = mask.to(outputs.dtype)
    return kept / kept.sum(1, keepdim=True)
