"""Lowers a Program to Triton: its layers become Triton's, chains of them are fused, parameters lie in memory order.

Convolution weights go from ``[O,C,kh,kw]`` to ``[O,kh,kw,C]``, and so do those of a linear layer that reads flattened
images: their memory is channels-last, and flattening them copies nothing. Every parameter starts at a multiple of 64
bytes, so that blocks are read in wide loads. Gaps are parameters that no node uses.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metafast.kernels.batch_norm import BatchNorm
from metafast.kernels.batch_norm.kernel import TritonBatchNorm
from metafast.kernels.contract.layer import Layer, Loss
from metafast.kernels.conv2d import Conv2d
from metafast.kernels.conv2d.kernel import TritonConv2d
from metafast.kernels.conv2d.normalised import NormalisedConv
from metafast.kernels.flatten import Flatten
from metafast.kernels.flatten.pixels import FlattenPixels
from metafast.kernels.linear import Linear
from metafast.kernels.max_pool2d import MaxPool2d
from metafast.kernels.pointwise.reference import ReLU
from metafast.program import Node, Parameter, Program

_ALIGNMENT = 16  # elements
_LARGEST_WINDOW = 16  # pixels that a fused pool unrolls
_MAX_BLOCKS = 65535  # of a grid along its second axis, that of tasks and groups


@dataclass(frozen=True)
class Lowered:
    """``program`` runs on Triton; element ``i`` of the user's flat vector lies at ``order[i]`` of its own.

    ``notes`` say for each node of the user's program how it runs. One launch takes ``max_tasks`` at most.
    """

    program: Program
    order: Tensor
    notes: tuple[str, ...]
    max_tasks: int

    def pack(self, flat: Tensor) -> Tensor:
        """``[..., P]`` of the user -> ``[..., P']``, zero in the gaps."""
        packed = flat.new_zeros(*flat.shape[:-1], self.program.size)
        return packed.index_copy_(-1, self.order, flat)

    def unpack(self, packed: Tensor) -> Tensor:
        """``[..., P']`` -> ``[..., P]`` of the user."""
        return packed.index_select(-1, self.order)


@functools.lru_cache(maxsize=64)
def lower(program: Program, precision: str, device: torch.device) -> Lowered:
    """The lowered Program."""
    convolved, flattened = _convolved(program), _flattened(program)
    channels = {program.nodes[i].params[0]: program.parameters[program.nodes[i].params[0]].shape[1] for i in convolved}
    channels |= {program.nodes[i + 1].params[0]: count for i, count in flattened.items()}
    memory = _memory_order(program, channels)
    builder = _Builder(program, precision, convolved, set(flattened), memory.place)
    for i in range(len(program.nodes)):
        if i not in builder.notes:
            builder.add(i)
    output = builder.value[program.output]
    lowered = Program(tuple(builder.nodes), tuple(memory.parameters), output, triton_loss(program.loss) or program.loss)
    notes = tuple(builder.notes[i] for i in range(len(program.nodes)))
    groups = max((node.layer.groups for node in program.nodes if isinstance(node.layer, Conv2d)), default=1)
    return Lowered(lowered, memory.order.to(device), notes, max(1, _MAX_BLOCKS // groups))


class _Builder:
    """Walks the nodes once; ``value`` maps the old numbers of values to the new ones."""

    def __init__(
        self, program: Program, precision: str, convolved: set[int], flattened: set[int], place: list[int]
    ) -> None:
        self.program, self.precision, self.place = program, precision, place
        self.convolved, self.flattened = convolved, flattened
        self.nodes: list[Node] = []
        self.value = {0: 0}
        self.notes: dict[int, str] = {}
        self.readers = _readers(program)

    def add(self, i: int) -> None:
        """Node ``i`` with what is fused behind it."""
        node = self.program.nodes[i]
        chain = self._chain(i)
        layer = self._layer(chain)
        inputs = tuple(self.value[v] for v in node.inputs)
        read = [self.program.nodes[j].params for j in chain]
        if isinstance(layer, NormalisedConv):
            read[0] = read[0][:1]  # a bias has no effect
        params = tuple(self.place[k] for own in read for k in own)
        self.nodes.append(Node(node.name, layer or node.layer, inputs, params, node.constants))
        self.value[chain[-1] + 1] = len(self.nodes)
        self.notes[i] = "rules in PyTorch" if layer is None or layer == FlattenPixels() else "Triton kernels"
        for j in chain[1:]:
            self.notes[j] = f"fused into {node.name}"

    def _chain(self, i: int) -> list[int]:
        """The nodes that become one with node ``i``."""
        chain = [i]
        if isinstance(self.program.nodes[i].layer, Conv2d) and i in self.convolved:
            norm = self._follower(i)
            if norm is None or not isinstance(norm.layer, BatchNorm) or norm.layer.fixed_statistics:
                return chain
            if self.program.moving[i + 1] != self.program.moving[chain[-1] + 2]:
                return chain
            chain.append(i + 1)
        if isinstance(self.program.nodes[chain[-1]].layer, BatchNorm):
            wanted = {"relu": _is_relu, "pool": _is_pool}
            while wanted and (follower := self._follower(chain[-1])) is not None:
                kind = next((k for k, test in wanted.items() if test(follower.layer)), None)
                if kind is None:
                    break
                del wanted[kind]
                chain.append(chain[-1] + 1)
        return chain

    def _follower(self, i: int) -> Node | None:
        """The next node, where it is the only reader of node ``i``."""
        if i + 1 >= len(self.program.nodes) or self.readers[i + 1] != 1:
            return None
        follower = self.program.nodes[i + 1]
        return follower if follower.inputs == (i + 1,) else None

    def _layer(self, chain: list[int]) -> Layer | None:
        layers = [self.program.nodes[j].layer for j in chain]
        first = layers[0]
        if isinstance(first, Conv2d):
            if chain[0] not in self.convolved:
                return None
            if len(chain) == 1:
                return TritonConv2d(first, self.precision)
            conv = TritonConv2d(replace(first, bias=False), self.precision)
            return NormalisedConv(conv, _norm(layers[1:]))
        if chain[0] in self.flattened:
            return FlattenPixels()
        return _norm(layers) if isinstance(first, BatchNorm) else triton_layer(first, self.precision)


def triton_layer(layer: Layer, precision: str = "float32") -> Layer | None:
    """The layer's rules as Triton kernels, where there are any: ``precision`` is that of operands of products."""
    lowered: Layer | None = _lowering_beside(type(layer).__module__)(layer, precision)
    return lowered


def triton_loss(loss: Loss) -> Loss | None:
    """The loss's rules as Triton kernels, where there are any."""
    lowered: Loss | None = _lowering_beside(type(loss).__module__)(loss, "float32")
    return lowered


@functools.cache
def _lowering_beside(reference: str) -> Callable[[Any, str], Any]:
    """The function ``lower`` of the file ``kernel.py`` beside a layer's module ``reference``."""
    folder, _, file = reference.rpartition(".")
    if not folder or file != "reference" or find_spec(f"{folder}.kernel") is None:
        return lambda layer, precision: None
    lower: Callable[[Any, str], Any] = import_module(f"{folder}.kernel").lower
    return lower


def _norm(layers: list[Layer]) -> TritonBatchNorm:
    norm, behind = layers[0], layers[1:]
    assert isinstance(norm, BatchNorm)  # the chain begins with it
    window = next((layer.kernel for layer in behind if isinstance(layer, MaxPool2d)), (1, 1))
    return TritonBatchNorm(norm, any(_is_relu(layer) for layer in behind), window)


def _is_relu(layer: Layer) -> bool:
    return isinstance(layer, ReLU)


def _is_pool(layer: Layer) -> bool:
    """Are windows small and side by side, and is what an edge cuts off left out?"""
    if not isinstance(layer, MaxPool2d) or layer.kernel[0] * layer.kernel[1] > _LARGEST_WINDOW:
        return False
    return layer == MaxPool2d(layer.kernel, layer.kernel)


def _convolved(program: Program) -> set[int]:
    """The convolutions whose weights nothing but convolutions reads: those may lie in another order."""
    others = {k for node in program.nodes if not isinstance(node.layer, Conv2d) for k in node.params}
    others |= {k for node in program.nodes if isinstance(node.layer, Conv2d) for k in node.params[1:]}
    return {i for i, n in enumerate(program.nodes) if isinstance(n.layer, Conv2d) and n.params[0] not in others}


def _readers(program: Program) -> Counter[int]:
    """How many nodes read a value, by value; the loss counts as one."""
    readers = Counter(v for node in program.nodes for v in node.inputs)
    readers[program.output] += 1
    return readers


def _flattened(program: Program) -> dict[int, int]:
    """The channels of the images that a node flattens, by node.

    The images come from a convolution, and the linear layer behind alone reads the features, and alone its weight.
    """
    readers, found = _readers(program), {}
    weights = Counter(k for node in program.nodes for k in node.params)
    for i, (node, behind) in enumerate(pairwise(program.nodes)):
        if node.layer != Flatten() or not isinstance(behind.layer, Linear) or behind.inputs != (i + 1,):
            continue
        channels = _channels(program, node.inputs[0])
        if channels and readers[i + 1] == 1 and weights[behind.params[0]] == 1:
            found[i] = channels
    return found


def _channels(program: Program, value: int) -> int:
    """The channels of an image that comes from a convolution by way of layers that keep them; zero of any other."""
    while value > 0:
        node = program.nodes[value - 1]
        if isinstance(node.layer, Conv2d):
            return program.parameters[node.params[0]].shape[0]
        if not node.layer.keeps_channels:
            return 0
        value = node.inputs[0]
    return 0


@dataclass
class _Memory:
    """Parameters with gaps between them.

    ``place`` is the index among them of each of the user's parameters, ``order`` the address of each of its elements.
    """

    parameters: list[Parameter]
    place: list[int]
    order: Tensor


def _memory_order(program: Program, channels: dict[int, int]) -> _Memory:
    """The parameters in memory; ``channels`` has those whose second axis, of channels, goes behind that of pixels."""
    memory = _Memory([], [], torch.empty(program.size, dtype=torch.int64))
    offset = 0
    for k, p in enumerate(program.parameters):
        places, shape = torch.arange(offset, offset + p.size), p.shape
        if k in channels:
            places = places.reshape(p.shape[0], -1, channels[k]).movedim(-1, 1).flatten()
            shape = (p.shape[0], *p.shape[2:], channels[k]) if len(p.shape) > 2 else p.shape
        memory.order[p.offset : p.offset + p.size] = places
        memory.place.append(len(memory.parameters))
        memory.parameters.append(Parameter(p.name, shape, offset, p.adapted))
        offset += p.size
        gap = -offset % _ALIGNMENT
        if gap:
            memory.parameters.append(Parameter(f"gap behind {p.name}", (gap,), offset, False))
            offset += gap
    return memory
