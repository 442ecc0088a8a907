"""ANIL: MAML whose inner loop moves the head alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from metafast.learners.maml import MAML


class ANIL(MAML):
    """Almost no inner loop (Raghu et al. 2020, 1909.09157): the inner loop moves only ``head``.

    The features of the support set do not change, so they are computed once; the body still gets its exact gradient,
    through the query loss and through the mixed second derivatives.
    """

    def __init__(self, model: nn.Module, *, head: str | nn.Module | Iterable[str | nn.Module], **options: Any) -> None:
        super().__init__(model, adapt=head, **options)
