"""Lowers a Program to Triton: layers get Triton kernels, chains of layers are fused, and parameters change their order.

Images lie in memory with their channels last. Weights of convolutions therefore go from ``[O, C, kh, kw]`` to
``[O, kh, kw, C]``. So do the weights of a linear layer that reads flattened images, because then flattening copies
nothing. Every parameter starts at a multiple of 64 bytes, so that kernels read it in wide loads; the gaps between them
are parameters that no node uses.
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

from metafast.executors.by_program import ByProgram
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
_LARGEST_WINDOW = 16  # the most pixels in the window of a fused pool, whose kernel unrolls them
_MAX_BLOCKS = 65535  # the most blocks along the second axis of a grid, where tasks times groups lie


@dataclass(frozen=True)
class Lowered:
    """Holds a Program that runs on Triton, and how it differs from the user's.

    Attributes:
        program: the lowered Program, with P' parameters, gaps among them.
        order: int64 ``[P]``, the place in the lowered flat vector of each element of the user's.
        notes: words for each node of the user's Program on how it runs.
        max_tasks: the most tasks that one launch takes.
    """

    program: Program
    order: Tensor
    notes: tuple[str, ...]
    max_tasks: int

    def pack(self, flat: Tensor) -> Tensor:
        """Takes the user's ``[..., (1 + K) P]`` to ``[..., (1 + K) P']``, with zeros in the gaps."""
        parts = flat.unflatten(-1, (-1, len(self.order)))
        packed = flat.new_zeros(*parts.shape[:-1], self.program.size)
        return packed.index_copy_(-1, self.order, parts).flatten(-2)

    def unpack(self, packed: Tensor) -> Tensor:
        """Takes ``[..., (1 + K) P']`` back to the user's ``[..., (1 + K) P]``."""
        return packed.unflatten(-1, (-1, self.program.size)).index_select(-1, self.order).flatten(-2)

    def pack_rates(self, rates: Tensor) -> Tensor:
        """Takes ``[..., 1 or P]`` to ``[..., 1 or P']``; in the gaps lie rates too, at which steps are defined."""
        if rates.shape[-1] == 1:
            return rates
        packed = rates[..., :1].expand(*rates.shape[:-1], self.program.size).clone()
        return packed.index_copy_(-1, self.order, rates)

    def unpack_rates(self, rates_grad: Tensor | None) -> Tensor | None:
        """Takes the gradient of the rates, ``[..., 1 or P']``, back to the shape of the user's rates."""
        return rates_grad if rates_grad is None or rates_grad.shape[-1] == 1 else self.unpack(rates_grad)


_LOWERED: ByProgram[Lowered] = ByProgram()


def lower(program: Program, precision: str, device: torch.device) -> Lowered:
    """Lowers ``program``; ``precision`` is that of the operands of products, ``device`` that of the parameters."""
    return _LOWERED.of(program, (precision, device), _lower)


def _lower(program: Program, target: tuple[str, torch.device]) -> Lowered:
    precision, device = target
    convolved = _convolved(program)
    flattened = _flattened(program)
    channels = {program.nodes[i].params[0]: program.parameters[program.nodes[i].params[0]].shape[1] for i in convolved}
    channels |= {program.nodes[i + 1].params[0]: count for i, count in flattened.items()}
    memory = _memory_order(program, channels)
    builder = _Builder(program, precision, convolved, set(flattened), memory.place)
    for i in range(len(program.nodes)):
        if i not in builder.notes:
            builder.add(i)
    output = builder.value[program.output]
    lowered = Program(tuple(builder.nodes), tuple(memory.parameters), output, *_losses(program))
    notes = tuple(builder.notes[i] for i in range(len(program.nodes)))
    groups = max((node.layer.groups for node in program.nodes if isinstance(node.layer, Conv2d)), default=1)
    return Lowered(lowered, memory.order.to(device), notes, max(1, _MAX_BLOCKS // groups))


class _Builder:
    """Lowers the nodes one after another.

    Attributes:
        place: the number in the lowered Program of each parameter of the user's.
        convolved: the convolutions that get kernels, by node.
        flattened: the nodes that flatten images whose memory has channels last.
        nodes: the lowered nodes.
        value: the number in the lowered Program of each value of the user's that still exists.
        notes: words on how each node of the user's runs; a node that has some is lowered already.
        readers: how many nodes read each value of the user's.
    """

    def __init__(
        self, program: Program, precision: str, convolved: set[int], flattened: set[int], place: list[int]
    ) -> None:
        self.program = program
        self.precision = precision
        self.place = place
        self.convolved = convolved
        self.flattened = flattened
        self.nodes: list[Node] = []
        self.value = {0: 0}
        self.notes: dict[int, str] = {}
        self.readers = _readers(program)

    def add(self, i: int) -> None:
        """Lowers node ``i`` together with the nodes that are fused into it."""
        node = self.program.nodes[i]
        chain = self._chain(i)
        layer = self._layer(chain)
        inputs = tuple(self.value[v] for v in node.inputs)
        read = [self.program.nodes[j].params for j in chain]
        if isinstance(layer, NormalisedConv):
            read[0] = read[0][:1]  # the norm takes the bias of the convolution away again
        params = tuple(self.place[k] for own in read for k in own)
        self.nodes.append(Node(node.name, layer or node.layer, inputs, params, node.constants))
        self.value[chain[-1] + 1] = len(self.nodes)
        self.notes[i] = "rules in PyTorch" if layer is None or layer == FlattenPixels() else "Triton kernels"
        for j in chain[1:]:
            self.notes[j] = f"fused into {node.name}"

    def _chain(self, i: int) -> list[int]:
        """Lists node ``i`` and the nodes behind it that are fused into it."""
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
        """Returns the next node if it is the only reader of node ``i``."""
        if i + 1 >= len(self.program.nodes) or self.readers[i + 1] != 1:
            return None
        follower = self.program.nodes[i + 1]
        return follower if follower.inputs == (i + 1,) else None

    def _layer(self, chain: list[int]) -> Layer | None:
        """Returns the layer with Triton kernels that does what the nodes of ``chain`` do, if there is one."""
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
    """Returns a layer whose rules are Triton kernels, if there are any; ``precision`` is that of products' operands."""
    lowered: Layer | None = _lowering_beside(type(layer).__module__)(layer, precision)
    return lowered


def triton_loss(loss: Loss) -> Loss | None:
    """Returns a loss whose rules are Triton kernels, if there are any."""
    lowered: Loss | None = _lowering_beside(type(loss).__module__)(loss, "float32")
    return lowered


def _losses(program: Program) -> tuple[Loss, Loss | None]:
    """Returns the loss, and that of the query sets where it is another one, with rules in Triton if there are any."""
    loss, other = program.loss, program.query_loss
    return triton_loss(loss) or loss, other and (triton_loss(other) or other)


@functools.cache
def _lowering_beside(reference: str) -> Callable[[Any, str], Any]:
    """Returns the function ``lower`` of the file ``kernel.py`` beside the module ``reference`` of a layer.

    Without such a file it returns a function that always returns ``None``.
    """
    folder, _, file = reference.rpartition(".")
    if not folder or file != "reference" or find_spec(f"{folder}.kernel") is None:
        return lambda layer, precision: None
    lower: Callable[[Any, str], Any] = import_module(f"{folder}.kernel").lower
    return lower


def _norm(layers: list[Layer]) -> TritonBatchNorm:
    """Fuses a batch norm with the ReLU and the max pool that follow it, in either order; both may be missing."""
    norm = layers[0]
    behind = layers[1:]
    assert isinstance(norm, BatchNorm)  # the chain begins with it
    window = next((layer.kernel for layer in behind if isinstance(layer, MaxPool2d)), (1, 1))
    return TritonBatchNorm(norm, any(_is_relu(layer) for layer in behind), window)


def _is_relu(layer: Layer) -> bool:
    return isinstance(layer, ReLU)


def _is_pool(layer: Layer) -> bool:
    """Says whether it is a max pool of small windows, side by side, without padding and whole at the edges."""
    if not isinstance(layer, MaxPool2d) or layer.kernel[0] * layer.kernel[1] > _LARGEST_WINDOW:
        return False
    return layer == MaxPool2d(layer.kernel, layer.kernel)


def _convolved(program: Program) -> set[int]:
    """Returns the convolutions whose weights no other kind of layer reads, so that these may lie in another order."""
    others = {k for node in program.nodes if not isinstance(node.layer, Conv2d) for k in node.params}
    others |= {k for node in program.nodes if isinstance(node.layer, Conv2d) for k in node.params[1:]}
    return {i for i, n in enumerate(program.nodes) if isinstance(n.layer, Conv2d) and n.params[0] not in others}


def _readers(program: Program) -> Counter[int]:
    """Counts how many nodes read each value; the loss counts as one."""
    readers = Counter(v for node in program.nodes for v in node.inputs)
    readers[program.output] += 1
    return readers


def _flattened(program: Program) -> dict[int, int]:
    """Returns the nodes that flatten images for a linear layer whose weight can be put into channels-last order.

    That needs images that come from a convolution, features that only the linear layer reads, and a weight that no
    other node uses. The number of channels of the images is returned for each node.
    """
    readers = _readers(program)
    found = {}
    weights = Counter(k for node in program.nodes for k in node.params)
    for i, (node, behind) in enumerate(pairwise(program.nodes)):
        if node.layer != Flatten() or not isinstance(behind.layer, Linear) or behind.inputs != (i + 1,):
            continue
        channels = _channels(program, node.inputs[0])
        if channels and readers[i + 1] == 1 and weights[behind.params[0]] == 1:
            found[i] = channels
    return found


def _channels(program: Program, value: int) -> int:
    """Counts the channels of an image that comes from a convolution through layers that keep channels; else zero."""
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
    """Holds the parameters in their order in memory.

    Attributes:
        parameters: the lowered Program's parameters, gaps among them.
        place: the index in ``parameters`` of each of the user's parameters.
        order: int64 ``[P]``, the place in the lowered flat vector of each element of the user's.
    """

    parameters: list[Parameter]
    place: list[int]
    order: Tensor


def _memory_order(program: Program, channels: dict[int, int]) -> _Memory:
    """Puts the parameters into memory with aligned starts.

    ``channels`` holds the number of channels of each parameter ``[O, channels x pixels]`` that becomes
    ``[O, pixels x channels]``.
    """
    memory = _Memory([], [], torch.empty(program.size, dtype=torch.int64))
    offset = 0
    for k, p in enumerate(program.parameters):
        places = torch.arange(offset, offset + p.size)
        shape = p.shape
        if k in channels:
            places = places.reshape(p.shape[0], -1, channels[k]).movedim(-1, 1).flatten()
            shape = (p.shape[0], *p.shape[2:], channels[k]) if len(p.shape) > 2 else p.shape
        memory.order[p.offset : p.offset + p.size] = places
        memory.place.append(len(memory.parameters))
        memory.parameters.append(Parameter(p.name, shape, offset, p.adapted, p.reached))
        offset += p.size
        gap = -offset % _ALIGNMENT
        if gap:
            memory.parameters.append(Parameter(f"gap behind {p.name}", (gap,), offset, False))
            offset += gap
    return memory
