"""The slow truth of any inner loop: one task at a time, unrolled on the user's own module, in float64.

    theta_{s+1}, state_{s+1} = step(theta_s, state_s, clip(grad L_support(theta_s)))

The steps are those of torch.optim and the clipping that of torch.nn.utils, written so that autograd sees them. It knows
modules, tensors and numbers, and nothing of how metafast computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Parameters = dict[str, Tensor]
State = dict[str, Parameters]
"""The vectors of a rule by name, and each of them by the parameter's name."""


def at(value: Any, step: int, name: str = "") -> Any:
    """A hyper-parameter in a step: a number or tensor; a list of such by step; a mapping of such by parameter."""
    if isinstance(value, list):
        return at(value[min(step, len(value) - 1)], step, name)
    return value[name] if isinstance(value, Mapping) else value


def root(square: Tensor) -> Tensor:
    """The square root, with the derivative zero at zero."""
    return (square > 0) * torch.sqrt(square + (square <= 0) * (1 - square))


@dataclass(frozen=True)
class Rule:
    """A rule of torch.optim. ``hyper`` are its numbers by torch's names, ``"beta1"`` and ``"beta2"`` for ``betas``.

    ``flags`` are options that are on or off. ``max_value`` and ``max_norm`` are among ``hyper`` where it clips.
    """

    kind: str
    hyper: Mapping[str, Any]
    flags: frozenset[str] = frozenset()
    step: Callable[..., Tensor] | None = None

    def clipped(self, grads: Parameters, step: int) -> Parameters:
        """Clips by value, then by norm."""
        if "max_value" in self.hyper:
            found = {}
            for name, g in grads.items():
                bound = torch.as_tensor(at(self.hyper["max_value"], step, name), dtype=g.dtype)
                found[name] = torch.minimum(torch.maximum(g, -bound), bound)
            grads = found
        if "max_norm" in self.hyper:
            norm = root(sum((g.square().sum() for g in grads.values()), torch.zeros((), dtype=torch.float64)))
            share = torch.clamp(at(self.hyper["max_norm"], step) / (norm + 1e-6), max=1.0)
            grads = {name: g * share for name, g in grads.items()}
        return grads

    def moved(self, theta: Tensor, g: Tensor, state: Parameters, count: int, name: str) -> Tensor:
        """The parameter after a step; ``state`` is changed. ``count`` is the number of the step, from 1."""
        hyper = {key: at(value, count - 1, name) for key, value in self.hyper.items()}
        return (self.step or getattr(self, self.kind))(theta, g, state, hyper, count)

    def sgd(self, theta: Tensor, g: Tensor, state: Parameters, hyper: Mapping[str, Any], count: int) -> Tensor:
        g = g + hyper["weight_decay"] * theta
        if "momentum" not in hyper:
            return theta - hyper["lr"] * g
        share = 1 if count == 1 else 1 - hyper["dampening"]
        velocity = hyper["momentum"] * state.get("momentum_buffer", 0) + share * g
        state["momentum_buffer"] = velocity
        return theta - hyper["lr"] * (g + hyper["momentum"] * velocity if "nesterov" in self.flags else velocity)

    def adam(self, theta: Tensor, g: Tensor, state: Parameters, hyper: Mapping[str, Any], count: int) -> Tensor:
        if self.kind == "adamw":
            theta = theta * (1 - hyper["lr"] * hyper["weight_decay"])
        else:
            g = g + hyper["weight_decay"] * theta
        mean = hyper["beta1"] * state.get("exp_avg", 0) + (1 - hyper["beta1"]) * g
        square = hyper["beta2"] * state.get("exp_avg_sq", 0) + (1 - hyper["beta2"]) * g * g
        state["exp_avg"], state["exp_avg_sq"] = mean, square
        if "amsgrad" in self.flags:
            before = state.get("max_exp_avg_sq", torch.zeros_like(square))
            square = torch.where(square > before, square, before)
            state["max_exp_avg_sq"] = square
        corrected = torch.as_tensor(1 - hyper["beta2"] ** count, dtype=torch.float64).sqrt()
        return theta - hyper["lr"] / (1 - hyper["beta1"] ** count) * mean / (root(square) / corrected + hyper["eps"])

    adamw = adam

    def rmsprop(self, theta: Tensor, g: Tensor, state: Parameters, hyper: Mapping[str, Any], count: int) -> Tensor:
        g = g + hyper["weight_decay"] * theta
        spread = hyper["alpha"] * state.get("square_avg", 0) + (1 - hyper["alpha"]) * g * g
        state["square_avg"] = spread
        if "centered" in self.flags:
            mean = hyper["alpha"] * state.get("grad_avg", 0) + (1 - hyper["alpha"]) * g
            state["grad_avg"] = mean
            spread = spread - mean * mean
        way = g / (root(spread) + hyper["eps"])
        if "momentum" in hyper:
            way = hyper["momentum"] * state.get("momentum_buffer", 0) + way
            state["momentum_buffer"] = way
        return theta - hyper["lr"] * way

    def adagrad(self, theta: Tensor, g: Tensor, state: Parameters, hyper: Mapping[str, Any], count: int) -> Tensor:
        g = g + hyper["weight_decay"] * theta
        total = state.get("sum", hyper.get("initial_accumulator_value", 0)) + g * g
        state["sum"] = total
        return theta - hyper["lr"] / (1 + (count - 1) * hyper["lr_decay"]) * g / (root(total) + hyper["eps"])


@dataclass(frozen=True)
class Loop:
    """The unrolled inner loop of one model.

    Args:
        model: the user's module, in float64. Gradients are found in its own parameters.
        loss: a callable of one task's outputs and targets; it may be a module with parameters of its own.
        steps: S.
        rule: what a step makes of the gradient.
        adapted: names of the parameters that the inner loop moves; ``None``: all that require a gradient.
        first_order: stop the gradient through each inner gradient.
        weights: ``w_1 .. w_S``; ``None``: the last alone.
        truncate: up to the last so many steps, ``theta_s`` is ``theta_0`` plus a constant, and the state a constant.
        start: the state before the first step, by its names; what is missing is the rule's own.
        query_loss: the loss of the query sets; ``None``: the same.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int
    rule: Rule
    adapted: Sequence[str] | None = None
    first_order: bool = False
    weights: Sequence[float] | None = None
    truncate: int | None = None
    start: State = field(default_factory=dict)
    query_loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def outputs(self, theta: Parameters, x: Any) -> Tensor:
        """Outputs of one task: ``x`` is a tensor, or a tuple or dict of tensors as the model takes them."""
        args, named = ((x,), {}) if isinstance(x, Tensor) else ((), x) if isinstance(x, Mapping) else (tuple(x), {})
        return functional_call(self.model, theta, args, named)

    def adapt(self, batches: Sequence[tuple[Any, Tensor]]) -> list[tuple[Parameters, State]]:
        """``theta_0 .. theta_S`` and the states of one task; ``batches`` are its samples and targets by step."""
        theta0 = dict(self.model.named_parameters())
        moved = [n for n, p in theta0.items() if p.requires_grad] if self.adapted is None else list(self.adapted)
        # A leaf of its own for each parameter: those that require no gradient may be adapted too.
        theta = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in theta0.items()}
        state: State = {n: {key: of[n] for key, of in self.start.items()} for n in moved}
        found = [(theta, state)]
        for step, (x, y) in enumerate(batches):
            theta, state = found[-1]
            loss = self.loss(self.outputs(theta, x), y)
            grads = torch.autograd.grad(loss, [theta[n] for n in moved], create_graph=True, allow_unused=True)
            own = {n: g.detach() if self.first_order else g for n, g in zip(moved, grads, strict=True) if g is not None}
            own = self.rule.clipped(own, step)
            state = {n: dict(of) for n, of in state.items()}
            theta = {**theta, **{n: self.rule.moved(theta[n], g, state[n], step + 1, n) for n, g in own.items()}}
            if self.truncate is not None and step + 1 <= len(batches) - self.truncate:
                first = found[0][0]
                theta = {n: first[n] + (p - first[n]).detach() for n, p in theta.items()}
                state = {n: {key: v.detach() for key, v in of.items()} for n, of in state.items()}
            found.append((theta, state))
        return found

    def losses(self, tasks) -> tuple[Tensor, list[Tensor]]:
        """Weighted query losses ``[T]``, with their graph, and the outputs of each task after the last step."""
        weights = [0.0] * (self.steps - 1) + [1.0] if self.weights is None else self.weights
        losses, outputs = [], []
        for t in range(len(tasks)):
            trajectory = self.adapt(support_of(tasks, t, self.steps))
            x, y = cut(tasks.query_x, tasks.query_y, tasks.query_mask, t)
            total = torch.zeros((), dtype=torch.float64)
            for (theta, _), weight in zip(trajectory[1:], weights, strict=True):
                if weight or theta is trajectory[-1][0]:
                    out = self.outputs(theta, x)
                    total = total + weight * (self.query_loss or self.loss)(out, y)
            losses.append(total)
            outputs.append(out)
        return torch.stack(losses), outputs


def parts(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """What ``function`` makes of samples, or of each tensor that they consist of."""
    if isinstance(x, Tensor):
        return function(x)
    found = [function(part) for part in x.parts]
    return found if x.names is None else dict(zip(x.names, found, strict=True))


def cut(x: Any, y: Tensor, mask: Tensor | None, *place: int) -> tuple[Any, Tensor]:
    """The samples of one task that count."""
    kept = slice(None) if mask is None else mask[place]
    return parts(x, lambda part: part[place][kept]), y[place][kept]


def support_of(tasks, t: int, steps: int) -> list[tuple[Any, Tensor]]:
    """The samples of one task by step."""
    places = [(s, t) if tasks.each_step else (t,) for s in range(steps)]
    return [cut(tasks.support_x, tasks.support_y, tasks.support_mask, *place) for place in places]
