"""ANIL is MAML whose inner loop moves the head alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from metafast.learners.base import LearnerRecipe
from metafast.learners.maml import MAML


class ANIL(MAML):
    """ANIL, "almost no inner loop" (Raghu et al. 2020, 1909.09157), moves only ``head`` in the inner loop.

    With ``theta = (body, head)``: ``head_{s+1} = head_s - alpha dL_support(body, head_s)/dhead``. The features of the
    support set do not change, so they are computed once; the body still gets its exact gradient, through the query
    loss and through the mixed second derivatives.

    Args:
        head: names of parameters or modules, or modules.
        **options: those of :class:`MAML` but ``adapt``.

    Raises:
        ValueError: the model has no such head; the text names what it has.
    """

    name = "anil"
    paper = "Raghu, Raghu, Bengio, Vinyals 2020, 1909.09157"

    def __init__(self, model: nn.Module, *, head: str | nn.Module | Iterable[str | nn.Module], **options: Any) -> None:
        super().__init__(model, adapt=head, **options)

    @classmethod
    def recipe_options(cls, recipe: LearnerRecipe, model: nn.Module) -> dict[str, Any]:
        """The last layer of a recipe's network is called ``head``."""
        return {"head": "head"}
