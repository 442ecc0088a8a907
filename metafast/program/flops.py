"""What a meta-gradient costs at least: FLOPs and bytes, from the shapes alone.

FLOPs are those of matrix products and convolutions, two for each multiply-add, computed directly. Per sample, with
``F`` of the forward pass and ``f1`` of the nodes that only the input feeds (nothing flows back through them):

    inner step               3 F - f1       forward, both adjoints
    Hessian-vector product   6 F - 4 f1     two terms wherever the plain passes have one
    query                    3 F - f1

Where the inner loop leaves parameters alone, the products that fall away with them are not counted, and a part of the
network that no inner step changes runs once forward and once back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metafast.kernels.contract.layer import RuleContext
from metafast.program import Program
from metafast.program.interpreter import Pass
from metafast.tasks import Batch, TaskBatch


@dataclass(frozen=True)
class NodeCost:
    """One layer at work on one sample.

    ``flops`` and ``elements`` (of its output) are those of the forward pass; the flags say what its products need:
    ``input_depends`` on any parameter, ``input_moves`` with the inner steps, the weight is ``adapted``, the output
    ``moves``.
    """

    name: str
    kind: str
    flops: int
    elements: int
    input_depends: bool
    input_moves: bool
    adapted: bool
    moves: bool

    @property
    def query(self) -> int:
        """Forward, the weight's adjoint, and the input's where anything asks for it."""
        return self.flops * (2 + self.input_depends)

    @property
    def step(self) -> int:
        """One inner step; 0 in a part that no inner step changes."""
        return self.flops * (1 + self.adapted + self.input_moves) if self.moves else 0

    @property
    def hessian(self) -> int:
        """One Hessian-vector product with the rows of all parameters, stored activations."""
        if not self.moves:
            return 0
        tangent_forward = self.input_moves + self.adapted
        weight = 1 + self.input_moves
        return self.flops * (tangent_forward + weight + self.input_depends * (1 + self.adapted))

    def still(self, second_order: bool) -> int:
        """What a part that no inner step changes does on the support set: once, however many steps there are."""
        return 0 if self.moves else (self.query if second_order else self.flops)


@dataclass(frozen=True)
class ProgramCost:
    """A Program on samples of one shape. ``elements`` of the input, ``parameters`` P, and the nodes."""

    nodes: tuple[NodeCost, ...]
    elements: int
    parameters: int
    itemsize: int

    @property
    def forward(self) -> int:
        """``F``: FLOPs of the forward pass of one sample."""
        return sum(node.flops for node in self.nodes)

    @property
    def fed_by_input(self) -> int:
        """``f1``: those of the nodes that only the input feeds."""
        return sum(node.flops for node in self.nodes if not node.input_depends)

    @property
    def activations(self) -> int:
        """``A``: elements that the convolutions put out for one sample; without convolutions, that all products do."""
        products = [node for node in self.nodes if node.flops]
        convolutions = [node for node in products if node.kind.startswith("conv")]
        return sum(node.elements for node in convolutions or products)

    def step(self, samples: int) -> int:
        """FLOPs of one inner step of one task."""
        return samples * sum(node.step for node in self.nodes)

    def hessian(self, samples: int) -> int:
        """FLOPs of one Hessian-vector product of one task."""
        return samples * sum(node.hessian for node in self.nodes)

    def query(self, samples: int) -> int:
        """FLOPs of the query loss and its gradient of one task."""
        return samples * sum(node.query for node in self.nodes)

    def meta_gradient(
        self, tasks: int, support: int, query: int, steps: int, second_order: bool = True
    ) -> MetaCost:
        """The cost of one meta-gradient of ``tasks`` tasks with ``support`` and ``query`` samples each."""
        still = support * sum(node.still(second_order) for node in self.nodes)
        reverse = steps * self.hessian(support) if second_order else 0
        flops = tasks * (still + steps * self.step(support) + reverse + self.query(query))
        kept = 2 * steps * self.parameters if steps > 1 else 0  # theta_s, out and in
        least = tasks * ((support + query) * self.elements + kept) + 3 * self.parameters
        passes = steps * support * (7 + (13 if second_order else 0)) + query * 7
        streamed = tasks * (passes * self.activations + (2 * steps + 2) * self.parameters * 3)
        return MetaCost(flops, self.itemsize * least, self.itemsize * streamed)


@dataclass(frozen=True)
class MetaCost:
    """One meta-gradient.

    ``flops`` of direct arithmetic. ``least_bytes``: samples read once, ``theta_s`` written and read once, parameters
    and meta-gradient; activations never leave the chip. ``streamed_bytes``: every layer reads and writes its
    activations, 7 times a plain pass and 13 times a Hessian-vector product.
    """

    flops: int
    least_bytes: int
    streamed_bytes: int


@torch.no_grad()
def program_cost(program: Program, samples: torch.Tensor) -> ProgramCost:
    """The cost of ``program`` on samples like those of one task, ``[n, ...]``; their values do not matter.

    FLOPs are counted while a forward pass runs, so layers without rules of their own are counted too.

    Raises:
        ValueError: the program cannot take samples of this shape; the text names the layer.
    """
    count = samples.shape[0]
    x = torch.zeros_like(samples)[None]
    run = Pass(program, x.new_zeros(1, program.size), Batch(x, x), 0, (True,) * len(program.parameters))
    run.forward()
    nodes = []
    for i, node in enumerate(program.nodes):
        matrices = [program.parameters[k] for k in node.params if len(program.parameters[k].shape) > 1]
        nodes.append(
            NodeCost(
                name=node.name,
                kind=node.layer.kind,
                flops=_products(run, i) // count,
                elements=run.values[i + 1].numel() // count,
                input_depends=any(run.depends[v] for v in node.inputs),
                input_moves=any(program.moving[v] for v in node.inputs),
                adapted=any(matrix.adapted for matrix in matrices),
                moves=program.moving[i + 1],
            )
        )
    return ProgramCost(tuple(nodes), samples[0].numel(), program.size, samples.element_size())


def _products(run: Pass, i: int) -> int:
    """FLOPs of the products in node ``i``'s forward rule, counted as it runs: any layer's, with or without rules."""
    from torch.utils.flop_counter import FlopCounterMode  # 80 MB: only where it is used

    node = run.program.nodes[i]
    ctx = RuleContext(0, None, (False,) * len(node.inputs), (False,) * len(node.params))
    params, inputs = [run.params[k] for k in node.params], [run.values[v] for v in node.inputs]
    with FlopCounterMode(display=False) as counter:
        node.layer.forward(ctx, params, inputs, node.constants)
    return counter.get_total_flops()


def meta_cost(program: Program, tasks: TaskBatch, steps: int, second_order: bool = True) -> MetaCost:
    """The cost of one meta-gradient on ``tasks``."""
    cost = program_cost(program, tasks.support_x[0])
    support, query = tasks.support_x.shape[1], tasks.query_x.shape[1]
    return cost.meta_gradient(len(tasks), support, query, steps, second_order)
