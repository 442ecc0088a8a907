"""Turns a graph node that has no rules of its own into a pure function of tensors, for a ``Derived`` layer.

The function also computes the sizes and tuples that the node reads. In-place operations are replaced by their
out-of-place forms, and every parameter that is used on the way becomes an argument.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.imatmul: operator.matmul,
    operator.ipow: operator.pow,
}


def in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Says whether the node changes one of its inputs."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    return node.target in _OUT_OF_PLACE or node.target is operator.setitem or bool(node.kwargs.get("inplace"))


class Folded:
    """Computes one graph node for one task: ``folded(params, inputs) -> tensor``.

    Args:
        node: the node to compute.
        root: the module in which the names of the graph are looked up.
        folded: the nodes that make no tensor; those that ``node`` reads are computed on the way to it.
        attributes: the value of each node that fetches a parameter, a buffer or a constant.

    Attributes:
        inputs: the graph nodes whose values a call takes, in its order.
        params: the parameters whose values a call takes, in its order.
        order: the nodes that a call computes, one after another; ``node`` is the last.
        leaves: the index in ``params`` of each parameter that a node of the graph fetches.
        weights: the indices in ``params`` of each called module's own parameters, by name.
    """

    def __init__(
        self, node: fx.Node, root: nn.Module, folded: Container[fx.Node], attributes: Mapping[fx.Node, Any]
    ) -> None:
        self.node = node
        self.attributes = attributes
        self.order = _evaluation_order(node, folded)
        sources = list(dict.fromkeys(s for n in self.order for s in n.all_input_nodes))
        self.inputs = [s for s in sources if s not in attributes and s not in self.order]
        self.params: list[Tensor] = []
        self.leaves = {s: self._argument(attributes[s]) for s in sources if isinstance(attributes.get(s), nn.Parameter)}
        self.modules = {n: root.get_submodule(str(n.target)) for n in self.order if n.op == "call_module"}
        self.weights = {
            n: {name: self._argument(p) for name, p in module.named_parameters()} for n, module in self.modules.items()
        }

    @property
    def label(self) -> str:
        """Returns the name by which people know the operation, such as ``GRU`` or ``softmax``."""
        if self.node in self.modules:
            return type(self.modules[self.node]).__name__
        return getattr(self.node.target, "__name__", str(self.node.target))

    def __call__(self, params: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Tensor:
        known: dict[fx.Node, Any] = {**self.attributes, **dict(zip(self.inputs, inputs, strict=True))}
        known |= {leaf: params[i] for leaf, i in self.leaves.items()}
        for node in self.order:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            if kwargs.get("inplace"):
                kwargs = {**kwargs, "inplace": False}
            known[node] = self._run(node, args, kwargs, params)
        return known[self.node]

    def _run(self, node: fx.Node, args: Any, kwargs: Any, params: tuple[Tensor, ...]) -> Any:
        if node in self.modules:
            weights = {name: params[i] for name, i in self.weights[node].items()}
            return torch.func.functional_call(self.modules[node], weights, args, kwargs)
        if node.op == "call_method":
            name = str(node.target)
            return getattr(args[0], name.removesuffix("_") if in_place(node, None) else name)(*args[1:], **kwargs)
        return _OUT_OF_PLACE.get(node.target, node.target)(*args, **kwargs)

    def _argument(self, parameter: Tensor) -> int:
        """Makes the parameter an argument of the call and returns its index."""
        self.params.append(parameter)
        return len(self.params) - 1


def _evaluation_order(node: fx.Node, folded: Container[fx.Node]) -> list[fx.Node]:
    """Returns the folded nodes that ``node`` reads, each behind those that it reads itself, and ``node`` at the end."""
    order: list[fx.Node] = []

    def collect(n: fx.Node) -> None:
        for source in n.all_input_nodes:
            if source in folded and source not in order:
                collect(source)
        order.append(n)

    collect(node)
    return order
