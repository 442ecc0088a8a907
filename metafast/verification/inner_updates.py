"""Inner steps as one writes them by hand, by which oracle and peers are held to be independent of metafast's rules.

Only operations are used that torch and ``jax.numpy`` have under the same name, so that both take the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metafast.inner.rules import SGD, Adam
from metafast.program.rule import Rule

Arrays = Mapping[str, Any]
"""Parameters, or what belongs to them, by name."""


@dataclass(frozen=True)
class InnerUpdate:
    """Takes inner steps as ``torch.optim.SGD``, with momentum or without, and ``torch.optim.Adam`` do.

    Args:
        inner: an ``mf.SGD`` or ``mf.Adam`` with no setting but ``momentum``, or ``betas`` and ``eps``.
        lr: the learning rate, a number or an array of no dimension.
        array: ``torch`` or ``jax.numpy``.

    Raises:
        ValueError: ``inner`` is another rule, or has another setting.
    """

    inner: Rule
    lr: Any
    array: Any

    def __post_init__(self) -> None:
        inner = self.inner
        known: tuple[Rule, ...] = ()
        if isinstance(inner, SGD):
            known = (SGD(momentum=inner.momentum),)
        elif isinstance(inner, Adam):
            known = (Adam(betas=inner.betas, eps=inner.eps),)
        if inner not in known:
            raise ValueError(f"inner={inner!r}: peers know mf.SGD(momentum=...) and mf.Adam(betas=..., eps=...)")

    def start(self, params: Arrays) -> dict[str, tuple[Any, ...]]:
        """Returns the state before the first step: zeros for each vector of the rule and each parameter."""
        return {name: tuple(self.array.zeros_like(p) for _ in self.inner.states) for name, p in params.items()}

    def __call__(
        self, params: Arrays, grads: Arrays, state: Mapping[str, tuple[Any, ...]], count: Any
    ) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
        """Returns parameters and state after a step; ``count`` is its number, from 1."""
        found = {name: self._moved(p, grads[name], state[name], count) for name, p in params.items()}
        return {name: p for name, (p, _) in found.items()}, {name: own for name, (_, own) in found.items()}

    def _moved(self, p: Any, g: Any, state: tuple[Any, ...], count: Any) -> tuple[Any, tuple[Any, ...]]:
        inner: Any = self.inner  # numbers, where rules may have a Rate
        if isinstance(self.inner, Adam):
            (beta1, beta2), (mean, square) = inner.betas, state
            mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g * g
            denominator = self._root(square) / (1 - beta2**count) ** 0.5 + inner.eps
            return p - self.lr / (1 - beta1**count) * mean / denominator, (mean, square)
        if not state:
            return p - self.lr * g, ()
        velocity = inner.momentum * state[0] + g
        return p - self.lr * velocity, (velocity,)

    def _root(self, square: Any) -> Any:
        """Returns the square root, whose derivative is zero where it has none: where all gradients have been zero."""
        where, positive = self.array.where, square > 0
        return where(positive, self.array.sqrt(where(positive, square, 1.0)), 0.0)
