"""The native executor: the whole meta-step of a batch of tasks in one C++ call, on the CPU in float32 or float64.

Each task's inner loop and reverse sweep run on one core, tasks are spread over torch's threads, and the numbers do
not depend on how many there are. The extension is built for several instruction sets; the best one is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metafast.executors.base import Executor, MetaGradient
from metafast.program import Node, Program
from metafast.tasks import Batch, TaskBatch

try:
    from metafast import _C  # type: ignore[attr-defined]
except ImportError as error:  # metafast works without it: `metafast doctor` says what that costs
    _C = None
    _MISSING = f"metafast._C is not installed ({error}); build it with: pip install --no-build-isolation -e ."

_BUDGET = 256 << 20

# As numbered in csrc/core/program.h and csrc/core/plan.cpp.
_KINDS = {
    "conv2d": 0, "batch_norm": 1, "layer_norm": 2, "relu": 3, "leaky_relu": 4, "tanh": 5, "sigmoid": 6, "gelu": 7,
    "max_pool2d": 8, "avg_pool2d": 9, "add": 10, "linear": 100, "flatten": 101, "adaptive_avg_pool2d": 102,
}  # fmt: skip
_LOSSES = {"cross_entropy": 0, "mse": 1}
_OPTIONS = 10


class NativeExecutor(Executor):
    """C++ on the CPU. ``budget`` bounds the bytes of activations kept from the inner loop for the way back; beyond it
    they are computed again. ``isa`` names one of ``NativeExecutor.isas()``; ``None`` takes the best."""

    name = "native"

    def __init__(self, budget: int = _BUDGET, isa: str | None = None) -> None:
        self.budget = budget
        self._isa = isa
        self._models: WeakKeyDictionary[Program, dict[tuple[int, ...], _Model]] = WeakKeyDictionary()

    @staticmethod
    def isas() -> tuple[str, ...]:
        """The instruction sets that this processor and this build have in common, the best first."""
        return () if _C is None else tuple(_C.isas())

    @property
    def isa(self) -> str:
        """The instruction set that runs."""
        return self._isa or self.isas()[0]

    def refuses(self, program: Program, x: Tensor, masked: bool = False) -> str | None:
        if _C is None:
            return _MISSING
        if self.isa not in self.isas():
            return f"isa={self.isa!r} is not among {list(self.isas())}"
        if x.device.type != "cpu":
            return f"device {x.device}: it runs on the CPU"
        if x.dtype not in (torch.float32, torch.float64):
            return f"dtype {x.dtype}: it runs float32 and float64"
        if masked:
            return "tasks of different sizes (sample masks)"
        reason = _foreign(program) or _ranks(program, x)
        if reason is not None:
            return reason
        try:
            self._memory(program, x, x.shape[1])
        except ValueError as error:
            return str(error)
        return None

    def explain(self, program: Program, x: Tensor) -> list[str]:
        where = f"C++ ({self.isa}), one task a core"
        return [where for _ in program.nodes]

    def memory(self, program: Program, support: Tensor, query: Tensor, steps: int) -> tuple[bool, int]:
        """Are the activations of every inner step kept, and the bytes of working memory that a meta-gradient takes.

        ``support`` and ``query`` are batches ``[T, n, ...]``.
        """
        tape, tangents, plain = self._memory(program, support, query.shape[1])
        threads = min(torch.get_num_threads(), support.shape[0])
        keep = steps * tape * threads <= self.budget
        parameters = (2 * steps + 4) * program.size * support.element_size()
        return keep, threads * ((steps if keep else 1) * tape + max(tangents, plain) + parameters)

    def predict(self, program: Program, params: Tensor, x: Tensor, step: int = 0) -> Tensor:
        model = self._model(program, x)
        out = _run(torch.ops.metafast.predict, *self._head(program, model, params), _ready(params), _ready(x), step)
        return model.shaped(out)

    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        model = self._model(program, batch.x)
        losses, grads, outputs = _run(
            torch.ops.metafast.loss_and_grad, *self._head(program, model, params), _ready(params),
            *_samples(program, batch), step,
        )  # fmt: skip
        return losses, grads, model.shaped(outputs)

    def adapt(self, program: Program, params: Tensor, lr: Tensor, support: Batch, steps: int) -> Tensor:
        head = self._head(program, self._model(program, support.x), params)
        rates = _ready(lr.to(params.dtype))
        return _run(torch.ops.metafast.adapt, *head, _ready(params), rates, *_samples(program, support), steps)

    def adapt_vjp(
        self,
        program: Program,
        trajectory: Tensor,
        lr: Tensor,
        support: Batch,
        v: Tensor,
        *,
        first_order: bool = False,
        needs_lr: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        head = self._head(program, self._model(program, support.x), trajectory)
        grads, lr_grad = _run(
            torch.ops.metafast.adapt_vjp, *head, _ready(trajectory), _ready(lr.to(trajectory.dtype)),
            *_samples(program, support), _ready(v), first_order, needs_lr,
        )  # fmt: skip
        return grads, lr_grad if needs_lr else None

    def meta_gradient(
        self,
        program: Program,
        params: Tensor,
        lr: Tensor,
        tasks: TaskBatch,
        steps: int,
        *,
        step_weights: list[float] | None = None,
        first_order: bool = False,
        needs_lr: bool = True,
    ) -> MetaGradient:
        model = self._model(program, tasks.support_x)
        weights = _weights(tuple(step_weights or [0.0] * steps + [1.0]))
        losses, outputs, grad, lr_grad = _run(
            torch.ops.metafast.meta_gradient, *self._head(program, model, params), _ready(params),
            _ready(lr.to(params.dtype)), *_samples(program, tasks.support), *_samples(program, tasks.query), weights,
            first_order, needs_lr, self.budget,
        )  # fmt: skip
        return MetaGradient(losses, model.shaped(outputs), grad, lr_grad if needs_lr else None)

    def _memory(self, program: Program, x: Tensor, queries: int) -> tuple[int, int, int]:
        model = self._model(program, x)
        double = x.dtype == torch.float64
        sizes = _run(torch.ops.metafast.memory, model.description, self.isa, double, x.shape[1], queries)
        tape, tangents, plain = (int(v) * x.element_size() for v in sizes.tolist())
        return tape, tangents, plain

    def _head(self, program: Program, model: _Model, params: Tensor) -> tuple[Tensor, str, Tensor]:
        constants = [c.detach().to(params.dtype).reshape(-1) for c in model.constants]
        return model.description, self.isa, torch.cat(constants) if constants else _nothing(params.dtype)

    def _model(self, program: Program, x: Tensor) -> _Model:
        known = self._models.get(program)
        if known is None:
            known = self._models[program] = {}
        shape = x.shape[2:]
        if shape not in known:
            constants = tuple(c for node in program.nodes for c in node.constants)
            known[shape] = _Model(_describe(program, shape), _rank(program, len(shape)), constants)
        return known[shape]


@dataclass(frozen=True)
class _Model:
    """A Program for samples of one shape, as C++ reads it."""

    description: Tensor
    rank: int
    constants: tuple[Tensor, ...] = ()

    def shaped(self, outputs: Tensor) -> Tensor:
        """Outputs ``[T, n, c, h, w]`` in the shape that the model gives them."""
        return outputs if self.rank == 3 else outputs.flatten(2)


def _foreign(program: Program) -> str | None:
    """What it has no rules for."""
    if program.loss.stem not in _LOSSES:
        return f"loss {program.loss.stem!r}: it has cross_entropy and mse"
    for node in program.nodes:
        layer: Any = node.layer
        if layer.stem not in _KINDS:
            return f"{node.name}: no rules for {layer.stem!r}"
        if layer.stem == "flatten" and (layer.start, layer.end) not in ((1, -1), (1, 3)):
            return f"{node.name}: flatten of axes {layer.start}..{layer.end}; it flattens whole samples"
    return None


def _ranks(program: Program, x: Tensor) -> str | None:
    if x.dim() not in (3, 5):
        return f"samples of shape {tuple(x.shape[2:])}: it takes [features] and [C, H, W]"
    ranks = [x.dim() - 2]
    for node in program.nodes:
        rank = ranks[node.inputs[0]]
        ranks.append(1 if node.layer.stem == "flatten" else rank)
        wanted = {"linear": 1, "conv2d": 3, "max_pool2d": 3, "avg_pool2d": 3, "adaptive_avg_pool2d": 3}
        if wanted.get(node.layer.stem, rank) != rank:
            return f"{node.name}: {node.layer.stem} of values with {rank} axes behind the samples"
    return None


def _rank(program: Program, rank: int) -> int:
    ranks = [rank]
    for node in program.nodes:
        ranks.append(1 if node.layer.stem == "flatten" else ranks[node.inputs[0]])
    return ranks[program.output]


def _describe(program: Program, sample: tuple[int, ...]) -> Tensor:
    channels, height, width = sample if len(sample) == 3 else (*sample, 1, 1)
    numbers: list[float] = [_LOSSES[program.loss.stem], program.output, height, width, channels]
    numbers += [len(program.parameters), len(program.nodes)]
    for p in program.parameters:
        numbers += [p.offset, p.size, p.adapted]
    constants = 0
    for node in program.nodes:
        options = _options(program, node)
        numbers += [_KINDS[node.layer.stem], *_padded(node.inputs, 2), *_padded(_slots(node), 2), constants]
        numbers += [*options, *[0] * (_OPTIONS - len(options))]
        constants += sum(c.numel() for c in node.constants)
    return torch.tensor(numbers, dtype=torch.float64)


def _padded(indices: tuple[int, ...], length: int) -> list[int]:
    return [*indices, *[-1] * (length - len(indices))]


def _slots(node: Node) -> tuple[int, ...]:
    """Parameters as weight and bias; a norm may have either alone."""
    layer: Any = node.layer
    if layer.stem in ("batch_norm", "layer_norm") and layer.shift and not layer.scale:
        return (-1, *node.params)
    return node.params


def _options(program: Program, node: Node) -> list[float]:
    layer: Any = node.layer
    shapes = [program.parameters[p].shape for p in node.params]
    options: dict[str, Callable[[], list[float]]] = {
        "linear": lambda: [*shapes[0]],
        "conv2d": lambda: [*shapes[0], *layer.stride, *layer.padding, *layer.dilation],
        "batch_norm": lambda: [layer.eps, layer.given, shapes[0][0] if shapes and layer.mode == "per_step" else 1],
        "layer_norm": lambda: [layer.eps, layer.axes],
        "leaky_relu": lambda: [layer.negative_slope],
        "max_pool2d": lambda: [*layer.kernel, *layer.stride, *layer.padding, *layer.dilation, layer.ceil_mode],
        "avg_pool2d": lambda: [
            *layer.kernel, *layer.stride, *layer.padding, layer.ceil_mode, layer.count_include_pad, layer.divisor or 0
        ],
        "adaptive_avg_pool2d": lambda: [*layer.size],
    }  # fmt: skip
    return options.get(layer.stem, list)()


def _samples(program: Program, batch: Batch) -> tuple[Tensor, Tensor]:
    dtype = batch.x.dtype if program.loss.stem == "mse" else torch.int64
    return _ready(batch.x), _ready(batch.y if batch.y.dtype == dtype else batch.y.to(dtype))


@lru_cache
def _nothing(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


@lru_cache(64)
def _weights(weights: tuple[float, ...]) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64)


def _ready(x: Tensor) -> Tensor:
    return (x.detach() if x.requires_grad else x).contiguous()


def _run(op: Any, *arguments: Any) -> Any:
    try:
        return op(*arguments)
    except RuntimeError as error:
        raise ValueError(str(error).removeprefix("metafast: ")) from None
