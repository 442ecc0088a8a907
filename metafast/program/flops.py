"""Computes from shapes alone how many FLOPs and bytes a meta-gradient takes at least.

Only matrix products and convolutions are counted, computed directly, with two FLOPs for each multiply-add. ``F`` are
the FLOPs of the forward pass of one sample, and ``f1`` those of the nodes that read nothing but the input, whose
adjoint nobody needs. One sample then takes

    inner step               3 F - f1       the forward pass, the adjoints of the weights and of the inputs
    Hessian-vector product   6 F - 4 f1     two terms wherever these three have one
    query                    3 F - f1

Products that exist only for parameters that the inner loop does not move are left out, and a part of the network that
no inner step changes runs once forward and once back, where all steps have the same samples.

What a rule does with the gradient is elementwise. It has no products; it adds the bytes of the K vectors of its state:
``z = (theta, state)`` is as large as ``1 + K`` times the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metafast.kernels.contract.layer import RuleContext
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.interpreter import Pass
from metafast.tasks import Batch, TaskBatch


@dataclass(frozen=True)
class NodeCost:
    """Holds the cost of one layer on one sample.

    Attributes:
        name: the node's name in the Program.
        kind: the kind of the layer, such as ``"conv2d"``.
        flops: the FLOPs of the products in its forward rule.
        elements: the number of elements of its output.
        input_depends: whether its input depends on any parameter, so that the adjoint of the input is needed.
        input_moves: whether its input changes from inner step to inner step.
        adapted: whether the inner loop moves its weight.
        moves: whether its output changes from inner step to inner step.
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
        """Counts the FLOPs on a query sample: forward, the weight's adjoint, and the input's where it is needed."""
        return self.flops * (2 + self.input_depends)

    @property
    def step(self) -> int:
        """Counts the FLOPs of one inner step; they are 0 in a part that no inner step changes."""
        return self.flops * (1 + self.adapted + self.input_moves) if self.moves else 0

    @property
    def hessian(self) -> int:
        """Counts the FLOPs of one Hessian-vector product in the rows of all parameters, from stored activations."""
        if not self.moves:
            return 0
        tangent_forward = self.input_moves + self.adapted
        weight = 1 + self.input_moves
        return self.flops * (tangent_forward + weight + self.input_depends * (1 + self.adapted))

    def fixed_part(self, second_order: bool) -> int:
        """Counts the FLOPs on a support sample of a part that no inner step changes: it runs once for all steps."""
        return 0 if self.moves else (self.query if second_order else self.flops)


@dataclass(frozen=True)
class ProgramCost:
    """Holds the cost of a Program on samples of one shape.

    Attributes:
        nodes: the cost of each node.
        elements: the number of elements of one sample.
        parameters: the number P of parameters.
        itemsize: the bytes of one element.
    """

    nodes: tuple[NodeCost, ...]
    elements: int
    parameters: int
    itemsize: int

    @property
    def forward(self) -> int:
        """Counts ``F``, the FLOPs of the forward pass of one sample."""
        return sum(node.flops for node in self.nodes)

    @property
    def fed_by_input(self) -> int:
        """Counts ``f1``, the FLOPs of the nodes that read nothing but the input."""
        return sum(node.flops for node in self.nodes if not node.input_depends)

    @property
    def activations(self) -> int:
        """Counts the elements of the convolutions' outputs for one sample; without any, those of all products."""
        products = [node for node in self.nodes if node.flops]
        convolutions = [node for node in products if node.kind.startswith("conv")]
        return sum(node.elements for node in convolutions or products)

    def step(self, samples: int) -> int:
        """Counts the FLOPs of one inner step of one task on ``samples`` support samples."""
        return samples * sum(node.step for node in self.nodes)

    def hessian(self, samples: int) -> int:
        """Counts the FLOPs of one Hessian-vector product of one task on ``samples`` support samples."""
        return samples * sum(node.hessian for node in self.nodes)

    def query(self, samples: int) -> int:
        """Counts the FLOPs of the query loss of one task and its gradient on ``samples`` query samples."""
        return samples * sum(node.query for node in self.nodes)

    def meta_gradient(
        self, tasks: int, support: int, query: int, steps: int, second_order: bool = True, states: int = 0,
        each_step: bool = False,
    ) -> MetaCost:  # fmt: skip
        """Computes the cost of one meta-gradient of ``tasks`` tasks with ``support`` and ``query`` samples each.

        ``states`` is the number of vectors that the rule of the inner loop carries from step to step, and ``each_step``
        says whether every step has ``support`` samples of its own.
        """
        sets = steps if each_step else 1
        fixed = sets * support * sum(node.fixed_part(second_order) for node in self.nodes)
        reverse = steps * self.hessian(support) if second_order else 0
        flops = tasks * (fixed + steps * self.step(support) + reverse + self.query(query))
        kept = 2 * steps * (1 + states) * self.parameters if steps > 1 else 0  # z_s is written once and read once
        reads = 2 * sets if sets > 1 else 1  # samples of each step are read on the way forward and on the way back
        least = tasks * ((reads * support + query) * self.elements + kept) + 3 * self.parameters
        passes = steps * support * (7 + (13 if second_order else 0)) + query * 7
        streamed = tasks * (passes * self.activations + (2 * steps + 2) * self.parameters * (3 + 2 * states))
        return MetaCost(flops, self.itemsize * least, self.itemsize * streamed)


@dataclass(frozen=True)
class MetaCost:
    """Holds the cost of one meta-gradient of a batch of tasks.

    Attributes:
        flops: the FLOPs of its products, computed directly.
        least_bytes: the memory traffic where activations never leave the chip: samples are read once (those of each
            step twice, on the way forward and on the way back), ``z_s`` of each step is written and read once, and
            parameters and meta-gradient take 3 P elements.
        streamed_bytes: the memory traffic where every layer reads and writes its activations: 7 times in a gradient
            and 13 times in a Hessian-vector product. A step also reads and writes the state of the rule.
    """

    flops: int
    least_bytes: int
    streamed_bytes: int


@torch.no_grad()
def program_cost(program: Program, samples: torch.Tensor) -> ProgramCost:
    """Computes the cost of ``program`` on samples of the shape of ``samples [n, ...]``; their values do not matter.

    FLOPs are counted while a forward pass runs, so that layers without rules of their own are counted too.

    Raises:
        ValueError: the program cannot take samples of this shape; the text names the layer.
    """
    count = samples.shape[0]
    x = torch.zeros_like(samples)[None]
    seeds = torch.zeros(1, dtype=torch.int64, device=x.device)
    everything = (True,) * len(program.parameters)
    run = Pass(program, x.new_zeros(1, program.size), Batch(x, x, None, seeds), 0, everything)
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
    """Counts the FLOPs of the products in node ``i``'s forward rule, for all samples, while it runs."""
    from torch.utils.flop_counter import FlopCounterMode  # imports 80 MB, and so only where it is used

    node = run.program.nodes[i]
    ctx = RuleContext(0, None, (False,) * len(node.inputs), (False,) * len(node.params), run.batch.seeds)
    params = [run.params[k] for k in node.params]
    inputs = [run.values[v] for v in node.inputs]
    with FlopCounterMode(display=False) as counter:
        node.layer.forward(ctx, params, inputs, node.constants)
    return counter.get_total_flops()


def meta_cost(program: Program, tasks: TaskBatch, loop: InnerLoop) -> MetaCost:
    """Computes the cost of one meta-gradient on ``tasks``, judged after the last step of ``loop``.

    Raises:
        ValueError: the program cannot take these samples; the text names the layer.
    """
    samples = tasks.support.at(0).x
    cost, query = program_cost(program, samples[0]), tasks.query_x.shape[1]
    return cost.meta_gradient(
        len(tasks), samples.shape[1], query, loop.steps, not loop.first_order, loop.states, tasks.each_step
    )
