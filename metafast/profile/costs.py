"""Counts what each rule of each layer has to do at least: the FLOPs of its products, and the bytes of its operands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from metafast.profile.spans import LOSS
from metafast.program import Program
from metafast.program.flops import NodeCost, program_cost


@dataclass(frozen=True)
class RuleCost:
    """The cost of a rule for one task: the FLOPs of matrix products and convolutions by direct arithmetic, and the
    bytes when every operand is moved once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class LayerCosts:
    """The costs of a layer, or of several that an executor runs as one. ``rules`` has them by phase (without the number
    of the step) and rule."""

    label: str
    kinds: tuple[str, ...]
    rules: Mapping[tuple[str, str], RuleCost]


def layer_costs(program: Program, leads: Iterable[str], sample: torch.Tensor, query: int) -> dict[str, LayerCosts]:
    """Counts the costs of all layers, by the names under which an executor reports its times.

    Args:
        program: the model.
        leads: those names. A node that is not among them runs as one with the node before it.
        sample: the support set of one task, ``[n, ...]``.
        query: the number of samples of its query set.
    """
    cost = program_cost(program, sample)
    named = set(leads)
    groups: list[list[int]] = []
    for i, node in enumerate(program.nodes):
        if node.name in named or not groups:
            groups.append([i])
        else:
            groups[-1].append(i)
    elements = [cost.elements, *(node.elements for node in cost.nodes)]
    counts = {"inner step": sample.shape[0], "query": query, "reverse step": sample.shape[0]}
    found = {}
    for group in groups:
        nodes = [cost.nodes[i] for i in group]
        shown = [node for node in nodes if node.kind != "flatten"] or nodes
        sizes = _Sizes(
            sum(elements[v] for v in program.nodes[group[0]].inputs),
            nodes[-1].elements,
            sum(program.parameters[k].size for i in group for k in program.nodes[i].params),
            cost.itemsize,
        )
        rules = {
            (phase, rule): rule_cost
            for phase, samples in counts.items()
            for rule, rule_cost in _rules(nodes, sizes, samples, phase == "query").items()
        }
        label = " + ".join(node.name for node in shown)
        found[program.nodes[group[0]].name] = LayerCosts(label, tuple(node.kind for node in shown), rules)
    found[LOSS] = LayerCosts(f"{LOSS} ({program.loss.kind})", (program.loss.kind,), {})
    return found


@dataclass(frozen=True)
class _Sizes:
    """Numbers of elements: of one sample's input (``x``) and output (``y``), and of the parameters (``w``).
    ``itemsize`` is in bytes."""

    x: int
    y: int
    w: int
    itemsize: int

    def bytes(self, samples: int, x: int, y: int, w: int) -> float:
        """Returns the bytes of ``samples`` samples when inputs move ``x`` times, outputs ``y`` and parameters ``w``."""
        return self.itemsize * (samples * (x * self.x + y * self.y) + w * self.w)


def _rules(nodes: list[NodeCost], sizes: _Sizes, samples: int, query: bool) -> dict[str, RuleCost]:
    """Returns the cost of each rule. The query pass needs the adjoints of all parameters, an inner step those of the
    adapted ones."""
    first = nodes[0]
    into = first.input_depends if query else first.input_moves
    forward = samples * sum(node.flops for node in nodes)
    backward = samples * sum(n.query - n.flops if query else n.flops * (n.adapted + n.input_moves) for n in nodes)
    tangent_forward = samples * sum(n.flops * (n.input_moves + n.adapted) for n in nodes)
    tangent_backward = samples * sum(n.hessian - n.flops * (n.input_moves + n.adapted) for n in nodes)
    return {
        "forward": RuleCost(forward, sizes.bytes(samples, 1, 1, 1)),
        "backward": RuleCost(backward, sizes.bytes(samples, 1 + into, 1, 2)),
        "tangent_forward": RuleCost(tangent_forward, sizes.bytes(samples, 2, 1, 2)),
        "tangent_backward": RuleCost(tangent_backward, sizes.bytes(samples, 2 + first.input_depends, 2, 3)),
    }
