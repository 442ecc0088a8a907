"""Defines the Program, the form in which an executor sees a model.

A Program lists its nodes so that every value is made before it is read: value 0 is the batch's input, and node ``i``
makes value ``i + 1``. One flat vector ``[P]`` has a place for each parameter. A Program holds no values of parameters,
so that one Program serves any number of tasks, and an update of all their parameters is a single axpy on ``[T, P]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import is_

import torch
from torch import Tensor

from metafast.kernels.contract.layer import Layer, Loss
from metafast.kernels.noise import Noise


@dataclass(frozen=True)
class Parameter:
    """Describes one parameter and its place in the flat vector.

    Attributes:
        name: its name in the user's module.
        shape: its shape; in ``per_step`` batch norm there is a leading axis of ``S + 1`` rows.
        offset: the index of its first element in the flat vector.
        adapted: whether the inner loop moves it.
        reached: whether a gradient of the outputs goes back to it. Else torch.optim leaves it as it is, where weight
            decay would move what has a gradient of zero.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    adapted: bool
    reached: bool = True

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
        line: the line of the user's code that it comes from, as ``file:number (text)``; empty where that is unknown.
    """

    name: str
    layer: Layer
    inputs: tuple[int, ...]
    params: tuple[int, ...] = ()
    constants: tuple[Tensor, ...] = ()
    line: str = ""


@dataclass(frozen=True, eq=False)
class Program:
    """Describes a model and its loss.

    Attributes:
        nodes: the layers at work, each behind those whose values it reads.
        parameters: the parameters, in the order of the flat vector.
        output: the number of the value that the loss reads.
        loss: the loss.
        query_loss: the loss of the query sets, where it is another one than that of the support sets.
        held_from: the Program of which this one has copies of the constants, if it has.
        by_samples: where some node depends on the number of samples, the Program for each number that is known.
    """

    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    output: int
    loss: Loss
    query_loss: Loss | None = None
    held_from: Program | None = None
    by_samples: Mapping[int, Program] = field(default_factory=dict)

    def at(self, samples: int) -> Program:
        """Returns the Program for tasks of that many samples.

        Raises:
            ValueError: some node depends on the number of samples, and this one has not been captured.
        """
        if not self.by_samples:
            return self
        if samples not in self.by_samples:
            raise ValueError(f"this model depends on the number of samples, and was not run on {samples} of them yet")
        return self.by_samples[samples]

    def computes_as(self, other: Program) -> bool:
        """Says whether both have the same nodes, and so compute the same for any number of samples."""
        return self.parameters == other.parameters and self.output == other.output and all(
            a.layer == b.layer and a.inputs == b.inputs and a.params == b.params
            and len(a.constants) == len(b.constants) and all(map(is_, a.constants, b.constants))
            for a, b in zip(self.nodes, other.nodes, strict=False)
        ) and len(self.nodes) == len(other.nodes)  # fmt: skip

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

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Splits ``flat [..., P]`` into tensors ``[..., *shape]`` by the names of the parameters."""
        return {p.name: tensor for p, tensor in zip(self.parameters, self.unflatten(flat), strict=True)}

    @cached_property
    def derived(self) -> tuple[Node, ...]:
        """Returns the nodes that have no rules of their own, for any number of samples."""
        programs = (self, *self.by_samples.values())
        return tuple(node for program in programs for node in program.nodes if node.layer.kind == "derived")

    @property
    def all_constants(self) -> list[Tensor]:
        """Lists the constants of the nodes, for any number of samples."""
        programs = (self, *self.by_samples.values())
        return [constant for program in programs for node in program.nodes for constant in node.constants]

    @cached_property
    def adapted(self) -> Tensor:
        """Returns the bool mask ``[P]`` that is true where the inner loop moves the parameter."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for p in self.parameters:
            mask[p.offset : p.offset + p.size] = p.adapted and p.reached
        return mask

    @cached_property
    def adapting_all(self) -> Program:
        """Returns the same model as one whose inner loop moves every parameter."""
        if all(p.adapted for p in self.parameters):
            return self
        others = {n: p.adapting_all for n, p in self.by_samples.items()}
        return replace(self, parameters=tuple(replace(p, adapted=True) for p in self.parameters), by_samples=others)

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
    def draws(self) -> bool:
        """Says whether it draws random numbers, so that batches need seeds."""
        return any(isinstance(node.layer, Noise) for node in self.nodes) or any(
            program.draws for program in self.by_samples.values()
        )

    def holding_constants(self) -> Program:
        """Returns the Program with copies of its constants; it itself, where it has none."""
        if not any(node.constants for node in self.nodes):
            return self
        nodes = tuple(replace(node, constants=tuple(c.clone() for c in node.constants)) for node in self.nodes)
        others = {n: p.holding_constants() for n, p in self.by_samples.items()}
        return replace(self, nodes=nodes, held_from=self, by_samples=others)

    @property
    def query(self) -> Program:
        """Returns the model under the loss of the query sets: this Program, if it has one loss."""
        return self if self.query_loss is None else self._under_query_loss  # kept in itself it would keep itself alive

    @cached_property
    def _under_query_loss(self) -> Program:
        return self.with_loss(self.query_loss or self.loss)

    def with_loss(self, loss: Loss, query_loss: Loss | None = None) -> Program:
        """Returns the same model under another loss, and under ``query_loss`` on query sets where one is given."""
        others = {n: p.with_loss(loss, query_loss) for n, p in self.by_samples.items()}
        return replace(self, loss=loss, query_loss=query_loss, by_samples=others)
