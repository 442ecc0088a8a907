"""A Program as C++ reads it: what the native executors on the CPU and on a GPU share."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metafast.program import Node, Program
from metafast.tasks import Batch

try:
    from metafast import _C as extension  # type: ignore[attr-defined]

    missing = None
    # Its parameters may belong to graphs; what it gives does not.
    _library = torch.library.Library("metafast", "IMPL")
    _library.impl("cpu_meta_gradient", torch.library.fallthrough_kernel, "Autograd")
except ImportError as error:  # metafast works without it: `metafast doctor` says what that costs
    extension = None
    missing = f"metafast._C is not installed ({error}); build it with: pip install --no-build-isolation -e ."

if extension is not None and not hasattr(extension, "facts"):
    extension = None
    missing = "metafast._C is older than the rest; build it with: pip install --no-build-isolation -e ."

FACTS: dict[str, Any] = {"kinds": {}, "losses": {}} if extension is None else json.loads(extension.facts)
"""What the extension says of itself (csrc/torch/facts.h): names, numbers and layouts of which Python keeps no copy."""
LOSSES = tuple(name for name, loss in FACTS["losses"].items() if loss["reads"] != "gradient")
"""Those with rules in C++. The gradient of any other one in the outputs is computed elsewhere and handed to C++."""
_ALL = torch.empty(0, dtype=torch.int64)


class Model:
    """A Program, of which ``foreign`` names nothing, for samples of one shape."""

    def __init__(self, program: Program, sample: tuple[int, ...]) -> None:
        self.description = _describe(program, sample)
        self.constants = tuple(c for node in program.nodes for c in node.constants)
        self.rank = _ranks(program, len(sample))[program.output]

    def shaped(self, outputs: Tensor) -> Tensor:
        """Outputs ``[T, n, c, h, w]`` in the shape that the model gives them, ``rank`` axes behind the samples."""
        return outputs if self.rank == 3 else outputs.flatten(2)


SomeModel = TypeVar("SomeModel", bound=Model)


class Models(Generic[SomeModel]):
    """The models that an executor has seen, as long as their Programs live."""

    def __init__(self, make: Callable[[Program, tuple[int, ...]], SomeModel]) -> None:
        self._make = make
        self._known: WeakKeyDictionary[Program, dict[tuple[int, ...], SomeModel]] = WeakKeyDictionary()

    def of(self, program: Program, x: Tensor) -> SomeModel:
        """For samples like those of ``x [T, n, ...]``."""
        known = self._known.get(program)
        if known is None:
            known = self._known[program] = {}
        sample = x.shape[2:]
        if sample not in known:
            known[sample] = self._make(program, sample)
        return known[sample]


class Order:
    """Of ragged tasks: the samples of each that count, ahead of its padding. ``sizes [T]`` are their numbers; it is
    empty where all count."""

    def __init__(self, mask: Tensor | None) -> None:
        self.sizes, self._at = _ALL, None
        if mask is not None:
            order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
            self.sizes, self._at = mask.sum(1), (torch.arange(len(mask))[:, None], order)

    def pack(self, x: Tensor) -> Tensor:
        """``x [T, n, ...]`` in this order."""
        return ready(x) if self._at is None else ready(x[self._at])

    def unpack(self, x: Tensor) -> Tensor:
        """And back."""
        return x if self._at is None else torch.empty_like(x).index_put_(self._at, x)


def foreign(program: Program, x: Tensor) -> str | None:
    """The first layer without rules in C++, in words, or what it cannot take of samples ``x [T, n, ...]``."""
    for node in program.nodes:
        layer: Any = node.layer
        if layer.stem not in FACTS["kinds"]:
            return f"{node.name}: no rules for {layer.stem!r}"
        if layer.stem == "flatten" and (layer.start, layer.end) not in ((1, -1), (1, 3)):
            return f"{node.name}: flatten of axes {layer.start}..{layer.end}; it flattens whole samples"
    if x.dim() not in (3, 5):
        return f"samples of shape {tuple(x.shape[2:])}: it takes [features] and [C, H, W]"
    ranks = _ranks(program, x.dim() - 2)
    wanted = {"linear": 1, "conv2d": 3, "max_pool2d": 3, "avg_pool2d": 3, "adaptive_avg_pool2d": 3}
    for node in program.nodes:
        rank = ranks[node.inputs[0]]
        if wanted.get(node.layer.stem, rank) != rank:
            return f"{node.name}: {node.layer.stem} of values with {rank} axes behind the samples"
    return None


def ready(x: Tensor) -> Tensor:
    """Contiguous, and no part of a graph."""
    return (x.detach() if x.requires_grad else x).contiguous()


def targets(program: Program, batch: Batch) -> Tensor:
    """As the loss in C++ reads them."""
    loss = FACTS["losses"].get(program.loss.stem, FACTS["losses"]["external"])
    dtype = torch.int64 if loss["reads"] == "labels" else batch.x.dtype
    return batch.y if batch.y.dtype == dtype else batch.y.to(dtype)


@cache
def in_double(values: tuple[float, ...], device: torch.device) -> Tensor:
    """As a tensor, made once and kept: a CUDA graph may read it at any time."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def call(op: Any, *arguments: Any) -> Any:
    """Bad input is a ValueError; what a device or the twin's watch reports stays a RuntimeError."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        if str(error).startswith(("CUDA: ", "twin: ")):
            raise
        raise ValueError(str(error).removeprefix("metafast: ")) from None


def _ranks(program: Program, rank: int) -> list[int]:
    """By value: the axes behind the samples."""
    ranks = [rank]
    for node in program.nodes:
        ranks.append(1 if node.layer.stem == "flatten" else ranks[node.inputs[0]])
    return ranks


def _describe(program: Program, sample: tuple[int, ...]) -> Tensor:
    channels, height, width = sample if len(sample) == 3 else (*sample, 1, 1)
    loss = FACTS["losses"].get(program.loss.stem, FACTS["losses"]["external"])
    numbers: list[float] = [loss["number"], program.output, height, width, channels]
    numbers += [len(program.parameters), len(program.nodes)]
    for p in program.parameters:
        numbers += [p.offset, p.size, p.adapted]
    constants = 0
    for node in program.nodes:
        options = _options(program, node)
        numbers += [FACTS["kinds"][node.layer.stem], *_padded(node.inputs, 2), *_padded(_slots(node), 2), constants]
        numbers += [len(options), *options]
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
