"""Says which steps there are kernels for, and derives what they compute.

A step takes ``(theta, state)`` and the gradient ``g`` to ``(theta', state')``; a bar marks the adjoint of a value, and
``1[..]`` is one where it holds. Sums of adjoints of a number run over all parameters and tasks.

**Clipping** comes first: ``h = clamp(g, -b, b)``, and then ``c h`` with ``c = min(M / (n + 1e-6), 1)`` and ``n = |h|``
over all parameters of a task. With ``w`` the adjoint of ``c h``,

    Mbar = sum w h 1[c < 1] / (n + 1e-6)       nbar = -M Mbar / (n + 1e-6)
    hbar = c w + nbar h / n                     gbar = hbar 1[|g| <= b]       bbar = sum hbar sign(g) 1[|g| > b]

**SGD**, with ``g`` the clipped gradient, ``p = 1 - dampening``, and ``p = 1`` in the first step:

    a = g + decay theta,  v' = mu v + p a,  d = v'  or  a + mu v' (Nesterov),  theta' = theta - lr d

    dbar = -lr thetabar'                        lrbar = -sum thetabar' d
    v'bar += dbar  or  mu dbar                  mubar = sum v'bar v  (+ dbar v')
    vbar = mu v'bar                             dampeningbar = -sum v'bar a  after the first step
    gbar = abar = p v'bar  or  + dbar           decaybar = sum abar theta
    thetabar = thetabar' + decay abar

**Adam**, in the k-th step, with ``r = sqrt(v')``, whose derivative is zero where it is zero, ``s = lr / (1 - beta1^k)``
and ``e = (1 - beta2^k)^(-1/2)``:

    a = g + decay theta,  m' = beta1 m + (1 - beta1) a,  v' = beta2 v + (1 - beta2) a^2
    D = e r + eps,  q = m' / D,  theta' = theta - s q

    qbar = -s thetabar'                         lrbar = -sum thetabar' q / (1 - beta1^k)
    Dbar = -qbar q / D                          epsbar = sum Dbar
    m'bar += qbar / D                           v'bar += e Dbar / (2 r)
    gbar = abar = (1 - beta1) m'bar + 2 (1 - beta2) a v'bar
    mbar = beta1 m'bar                          thetabar = thetabar' + decay abar
    vbar = beta2 v'bar                          decaybar = sum abar theta
    beta1bar = sum m'bar (m - a) - thetabar' q lr k beta1^(k-1) / (1 - beta1^k)^2
    beta2bar = sum v'bar (v - a^2) + Dbar r k beta2^(k-1) e^3 / 2

**AdamW** has ``a = g`` and ``theta' = theta (1 - lr decay) - s q``, so that ``thetabar = (1 - lr decay) thetabar'``,
and ``-thetabar' theta decay`` and ``-thetabar' theta lr`` take part in ``lrbar`` and ``decaybar``.
"""

from __future__ import annotations

from dataclasses import dataclass

HYPER = {
    "sgd": ("lr", "momentum", "dampening", "weight_decay"),
    "adam": ("lr", "beta1", "beta2", "eps", "weight_decay"),
}
"""The hyper-parameters of each kind of step, in the order of their rows; the bounds of clipping follow."""


@dataclass(frozen=True)
class StepForm:
    """Says which step it is, apart from the values of its hyper-parameters.

    Args:
        kind: ``"sgd"`` or ``"adam"``.
        states: the number K of vectors beside theta.
        option: whether SGD looks ahead (Nesterov), or Adam's weight decay is decoupled.
        hyper: the hyper-parameters in the order of their rows: those of the kind, and then ``"max_norm"`` and
            ``"max_value"`` where the gradient is clipped.
    """

    kind: str
    states: int
    option: bool
    hyper: tuple[str, ...]

    def row(self, name: str) -> int:
        """Returns the row of a bound, or 0, which is that of the learning rate, where there is no such bound."""
        return self.hyper.index(name) if name in self.hyper else 0
