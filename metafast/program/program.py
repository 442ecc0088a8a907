"""Program: what a model is to an executor.

Nodes in an order in which every input comes before its use, and one flat vector ``[P]`` in which each parameter has
its place. Value 0 is the batch's input; node ``i`` makes value ``i + 1``. A Program holds no parameter values, so
one Program serves any number of tasks, and an update of all parameters is a single axpy on ``[T, P]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from metafast.kernels.contract.layer import Layer, Loss


@dataclass(frozen=True)
class Parameter:
    """One named parameter and where it lies in the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    adapted: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class Node:
    """One layer at work: which values it reads and which parameters it uses, in the order that its rules take them."""

    name: str
    layer: Layer
    inputs: tuple[int, ...]
    params: tuple[int, ...] = ()
    constants: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Program:
    """A model with its loss. ``output`` is the index of the value that the loss reads."""

    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    output: int
    loss: Loss

    @property
    def size(self) -> int:
        """P, the length of the flat parameter vector."""
        return self.parameters[-1].offset + self.parameters[-1].size if self.parameters else 0

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """The flat vector ``[P]`` (or ``[..., P]`` for leading axes that all share) of parameters by name."""
        lead = named[self.parameters[0].name].dim() - len(self.parameters[0].shape)
        return torch.cat([named[p.name].flatten(lead) if p.shape else named[p.name][..., None]
                          for p in self.parameters], dim=-1)

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Views of ``[..., P]`` as one tensor ``[..., *shape]`` a parameter, in the order of ``parameters``."""
        lead = flat.shape[:-1]
        return [flat[..., p.offset : p.offset + p.size].reshape((*lead, *p.shape)) for p in self.parameters]

    @cached_property
    def adapted(self) -> Tensor:
        """Mask ``[P]``: true where the inner loop moves the parameter."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for p in self.parameters:
            mask[p.offset : p.offset + p.size] = p.adapted
        return mask

    @cached_property
    def moving(self) -> tuple[bool, ...]:
        """By value: does it depend on an adapted parameter, and so change from inner step to inner step?"""
        moving = [False]
        for node in self.nodes:
            moving.append(
                node.layer.varies
                or any(moving[i] for i in node.inputs)
                or any(self.parameters[k].adapted for k in node.params)
            )
        return tuple(moving)

    def with_loss(self, loss: Loss) -> Program:
        """The same model under another loss."""
        return replace(self, loss=loss)
