"""Holds the hyper-parameters of a rule that are learned, or told apart by step, layer or parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from metafast.inner.rates import Rate, Rates
from metafast.inner.rules.checks import check_number
from metafast.program import Parameter
from metafast.program.rule import Rule


class HyperRates(nn.ModuleDict):
    """Holds :class:`~metafast.inner.rates.Rates` for each hyper-parameter of a rule that is a ``Rate``, by its name.

    Those that are plain numbers stay with the rule.
    """

    _table: tuple[list[float], Tensor, int, Tensor] | None = None

    @classmethod
    def of_rates(
        cls, rates: Mapping[str, Rate], parameters: Sequence[Parameter], steps: int, like: Tensor
    ) -> HyperRates:
        """Makes them as ``rates`` say; the other arguments are those of ``Rates``."""
        found = cls()
        for name, rate in rates.items():
            if hasattr(found, name) or not name.isidentifier():
                raise ValueError(
                    f"a hyper-parameter or state cannot be called {name!r} to be learned; call it otherwise"
                )
            found[name] = Rates(rate, parameters, steps, like)
        return found

    def start_from(self, rule: Rule) -> None:
        """Writes the values of another rule into what is there, so that an optimiser still holds it.

        Raises:
            ValueError: other hyper-parameters are learned or told apart than here.
        """
        wanted = described(rule)
        here = {name: self.of_name(name) for name in self}
        if {n: (r.axes, r.learn) for n, r in wanted.items()} != {n: (r.axes, r.learn) for n, r in here.items()}:
            raise ValueError(
                f"inner={rule!r}: the learner was made with the hyper-parameters {sorted(self)} to be learned or told "
                f"apart, and this rule has {sorted(wanted)}; optimisers and checkpoints hold them: make a new learner"
            )
        for name, rate in wanted.items():
            self.of_name(name).start_from(rate)

    @property
    def learn(self) -> bool:
        """Says whether any of them is a meta-parameter."""
        return any(rates.learn for rates in self.each())

    def of_name(self, name: str) -> Rates:
        """Returns the rates of one hyper-parameter."""
        rates = self[name]
        assert isinstance(rates, Rates)
        return rates

    def each(self) -> list[Rates]:
        """Lists the rates of all of them."""
        return [self.of_name(name) for name in self]

    @property
    def by_step(self) -> bool:
        """Says whether there is a number for each inner step."""
        return any(rates.by_step for rates in self.each())

    def table(self, rule: Rule, rates: Tensor, parameters: Sequence[Parameter]) -> Tensor:
        """Returns the learning rates ``[1 or S, 1 or P]`` and the rule's hyper-parameters, ``[H, 1 or S, 1 or P]``.

        They are in float64, in the order of the rule's ``hyper_names``.
        """
        names = rule.hyper_names[1:]
        given = [getattr(rule, name) for name in names]
        for name, value in zip(names, given, strict=True):
            if name not in self:
                check_number(f"{type(rule).__name__}.{name}", value, or_rate=False)
        fixed = not len(self) and not rates.requires_grad
        if fixed and self._table is not None:
            known, of_rates, version, found = self._table
            if known == given and of_rates is rates and version == rates._version:
                return found
        rows = [rates.double()]
        for name, value in zip(names, given, strict=True):
            rows.append(self.of_name(name).of(parameters).double() if name in self else rows[0].new_full((1, 1), value))
        found = torch.stack(torch.broadcast_tensors(*rows))
        if fixed:
            self._table = given, rates, rates._version, found
        return found


def described(rule: Rule) -> dict[str, Rate]:
    """Returns the hyper-parameters of a rule that are described by a ``Rate``."""
    names = rule.hyper_names[1:]
    return {name: value for name in names if isinstance(value := getattr(rule, name), Rate)}
