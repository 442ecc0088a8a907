"""Defines the Program, the form in which an executor sees a model.

A Program lists its nodes so that every value is made before it is read: value 0 is the batch's input, and node ``i``
makes value ``i + 1``. One flat vector ``[P]`` has a place for each parameter. A Program holds no values of parameters,
so that one Program serves any number of tasks, and an update of all their parameters is a single axpy on ``[T, P]``.
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
    """Describes one parameter and its place in the flat vector.

    Attributes:
        name: its name in the user's module.
        shape: its shape; in ``per_step`` batch norm there is a leading axis of ``S + 1`` rows.
        offset: the index of its first element in the flat vector.
        adapted: whether the inner loop moves it.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    adapted: bool

    @property
    def size(self) -> int:
        """Counts its elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class Node:
    """Describes one layer at work in a Program.

    Attributes:
        name: the name of the module or operation in the user's model.
        layer: the rules.
        inputs: the numbers of the values that it reads, in the order that its rules take them.
        params: the numbers of the parameters that it uses, in the order that its rules take them.
        constants: buffers of the user's module that it uses and nothing differentiates.
    """

    name: str
    layer: Layer
    inputs: tuple[int, ...]
    params: tuple[int, ...] = ()
    constants: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Program:
    """Describes a model and its loss.

    Attributes:
        nodes: the layers at work, each behind those whose values it reads.
        parameters: the parameters, in the order of the flat vector.
        output: the number of the value that the loss reads.
        loss: the loss.
        query_loss: the loss of the query sets, where it is another one than that of the support sets.
    """

    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    output: int
    loss: Loss
    query_loss: Loss | None = None

    @property
    def size(self) -> int:
        """Returns P, the length of the flat parameter vector."""
        return self.parameters[-1].offset + self.parameters[-1].size if self.parameters else 0

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """Joins parameters ``[..., *shape]``, given by name, into the flat vector ``[..., P]``."""
        lead = named[self.parameters[0].name].dim() - len(self.parameters[0].shape)
        return torch.cat(
            [named[p.name].flatten(lead) if p.shape else named[p.name][..., None] for p in self.parameters], dim=-1
        )

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Splits ``flat [..., P]`` into one tensor ``[..., *shape]`` for each of ``parameters``, in their order."""
        lead = flat.shape[:-1]
        return [flat[..., p.offset : p.offset + p.size].reshape((*lead, *p.shape)) for p in self.parameters]

    @cached_property
    def adapted(self) -> Tensor:
        """Returns the bool mask ``[P]`` that is true where the inner loop moves the parameter."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for p in self.parameters:
            mask[p.offset : p.offset + p.size] = p.adapted
        return mask

    @cached_property
    def moving(self) -> tuple[bool, ...]:
        """Says for each value whether it changes from inner step to inner step.

        It does where an adapted parameter goes into it, or a layer that varies with the step by itself.
        """
        moving = [False]
        for node in self.nodes:
            moving.append(
                node.layer.varies
                or any(moving[i] for i in node.inputs)
                or any(self.parameters[k].adapted for k in node.params)
            )
        return tuple(moving)

    @cached_property
    def query(self) -> Program:
        """Returns the model under the loss of the query sets: this Program, if it has one loss."""
        return self if self.query_loss is None else self.with_loss(self.query_loss)

    def with_loss(self, loss: Loss, query_loss: Loss | None = None) -> Program:
        """Returns the same model under another loss, and under ``query_loss`` on query sets where one is given."""
        return replace(self, loss=loss, query_loss=query_loss)
