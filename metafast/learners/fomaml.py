"""FOMAML: MAML without the Hessian terms."""

from __future__ import annotations

from typing import Any

from torch import nn

from metafast.learners.maml import MAML


class FOMAML(MAML):
    """First-order MAML: the Hessian terms of the meta-gradient are dropped (1703.03400, section 5.2)."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, first_order=True, **options)
