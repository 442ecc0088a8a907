"""FOMAML is MAML without the Hessian terms."""

from __future__ import annotations

from typing import Any

from torch import nn

from metafast.learners.maml import MAML


class FOMAML(MAML):
    """First-order MAML (Finn et al. 2017, 1703.03400, section 5.2) drops the Hessian terms of the meta-gradient.

    ``dJ/dtheta ~ mean_t grad L_query(theta_S,t)``. ``options`` are those of :class:`MAML` but ``first_order``.
    """

    name = "fomaml"
    paper = "Finn, Abbeel, Levine 2017, 1703.03400"

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, first_order=True, **options)
