"""Captures a user's nn.Module as a Program, by torch.fx. The module itself is not changed.

Modules and functions for which there are rules become the layers that have them; every other operation that makes a
tensor becomes a ``Derived`` layer. Sizes, shapes and tuples are no values of a Program: the layer that uses them
computes them again.
"""

from __future__ import annotations

import operator
import os
import re
import traceback
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from metafast.kernels.contract.layer import Layer, Loss
from metafast.kernels.derived import Derived
from metafast.program import Node, Parameter, Program
from metafast.program.derive import Folded, in_place
from metafast.program.patterns import Match, Recogniser

_SIZE_METHODS = {"size", "dim", "numel", "ndimension", "__len__"}
_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
_TUPLE_MAKERS = {"chunk", "split", "unbind", "tensor_split", "topk", "sort", "unsafe_chunk", "max", "min", "median",
                 "kthvalue", "mode", "cummax", "cummin", "aminmax", "var_mean", "std_mean"}  # fmt: skip
_VIEWS = {"view", "reshape", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "expand", "t", "narrow",
          torch.flatten, torch.reshape, torch.transpose, torch.permute, operator.getitem}  # fmt: skip
_RANDOM = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rand_like",
           "randn_like", "bernoulli", "multinomial", "rand", "randn", "normal", "randint", "randperm", "uniform",
           "random", "exponential"}  # fmt: skip
_REMEDIES = {
    "'len' is not supported": "use x.size(0) in the place of len(x)",
    "item assignment": "an in-place write has no place in a Program; build the tensor with torch.where or torch.cat",
}
_NO_BRANCHES = "It may not branch or loop on tensor values; use torch.where, or move the choice to __init__"


class CaptureError(TypeError):
    """Is raised where the model cannot become a Program; it names the line in the user's model and the remedy."""


class _Tracer(fx.Tracer):
    """Traces modules without children as one node each, and knows the user's line behind every node."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Makes a node that remembers the lines of ``forward`` it comes from.

        torch.fx can record them too, but imports modules of 160 MB to do so.
        """
        node = super().create_node(*args, **kwargs)
        frames = traceback.extract_stack()
        first = next((i for i, frame in enumerate(frames) if frame.name == "forward"), len(frames))
        node.stack_trace = "".join(traceback.format_list(frames[first:]))
        return node

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return not list(module.children()) or super().is_leaf_module(module, qualified_name)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        """Fixes the options of ``forward`` that have default values at those values."""
        function, proxies = super().create_args_for_root(*args, **kwargs)
        return function, [p.node.args[0] if isinstance(p, fx.Proxy) and p.node.args else p for p in proxies]


def capture(
    model: nn.Module, loss: Loss, *, bn: str = "task", adapt: Iterable[str] | None = None, steps: int = 1
) -> Program:
    """Returns the Program of ``model`` under ``loss``.

    Args:
        model: takes one batch ``[n, ...]`` and returns one tensor; its ``forward`` may branch only on what is known
            before the data comes.
        loss: a loss with rules, as ``metafast.program.losses.as_loss`` makes it.
        bn: the mode of every batch norm (see ``metafast.kernels.batch_norm``); ``per_step`` gives its parameters a
            leading axis of ``steps + 1`` rows.
        adapt: the names of the parameters that the inner loop moves; ``None`` means all of them.
        steps: the number S of inner steps; only ``per_step`` batch norm depends on it.

    Raises:
        CaptureError: the forward pass depends on the data, changes its input in place, or draws random numbers.
    """
    graph, root = trace(model)
    builder = _Builder(model, root, bn)
    for node in graph.nodes:
        builder.visit(node)
    return builder.finish(loss, adapt, steps)


def trace(model: nn.Module) -> tuple[fx.Graph, nn.Module]:
    """Returns the graph of the forward pass, and the module in which the names of its nodes are looked up.

    Raises:
        CaptureError: the forward pass cannot be captured.
    """
    tracer = _Tracer()
    random_state = torch.get_rng_state()
    try:
        graph = tracer.trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError, IndexError) as error:
        remedy = next((r for symptom, r in _REMEDIES.items() if symptom in str(error)), _NO_BRANCHES)
        raise CaptureError(
            f"the forward pass of {type(model).__name__} cannot be captured at {_user_line(error)}: {error}. {remedy}"
        ) from error
    if not torch.equal(random_state, torch.get_rng_state()):
        raise CaptureError(
            f"the forward pass of {type(model).__name__} draws random numbers; they have no exact meta-gradient: draw "
            "them in __init__ or take them out"
        )
    return graph, tracer.root


def _user_line(error: BaseException) -> str:
    """Returns the last line of the user's code that ``error`` went through, as ``file:number (text)``."""
    frames = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
    return _last_user_line(frames) or "an unknown line"


def _node_line(node: fx.Node) -> str:
    """Returns the line of the user's code that made ``node``, as ``file:number (text)``."""
    frames = re.findall(r'File "(.+?)", line (\d+), in .*\n\s*(.*)', node.stack_trace or "")
    return _last_user_line(frames) or f"node {node.name}"


def _last_user_line(frames: Iterable[tuple[Any, ...]]) -> str:
    library = os.path.dirname(torch.__file__)
    own = [f"{name}:{number} ({line})" for name, number, line in frames if not name.startswith((library, __file__))]
    return own[-1] if own else ""


class _Builder:
    """Visits the nodes of the graph in order and collects the Program's nodes and parameters.

    Attributes:
        names: the name of each parameter of the model, by its ``id``.
        shapes: the shape of each parameter that a layer uses, by name.
        per_step: the names of the parameters that get a row for each inner step.
        value: the number of the Program's value that a graph node makes.
        attribute: the parameter, buffer or constant that a graph node fetches.
        sizes: the graph nodes that make sizes, shapes, dtypes or devices.
        inlined: the graph nodes that make no tensor, ``sizes`` among them; the layers that use them compute them.
        nodes: name, layer, inputs, names of the parameters, and constants of each node of the Program.
        output: the number of the value that the model returns.
    """

    def __init__(self, model: nn.Module, root: nn.Module, bn: str) -> None:
        self.model = model
        self.root = root
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.per_step: set[str] = set()
        self.value: dict[fx.Node, int] = {}
        self.attribute: dict[fx.Node, Any] = {}
        self.recogniser = Recogniser(self.attribute, self.value, bn)
        self.sizes: set[fx.Node] = set()
        self.inlined: set[fx.Node] = set()
        self.nodes: list[tuple[str, Layer, tuple[int, ...], tuple[str, ...], tuple[Tensor, ...]]] = []
        self.output = 0

    def visit(self, node: fx.Node) -> None:
        """Takes up the next node of the graph."""
        self._refuse_random(node)
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "get_attr":
            self.attribute[node] = _fetch(self.root, str(node.target))
        elif node.op == "output":
            if node.args[0] not in self.value:
                raise CaptureError(
                    f"{type(self.model).__name__}.forward returns {node.args[0]}; it must return one tensor that "
                    "depends on its input"
                )
            self.output = self.value[node.args[0]]  # type: ignore[index]
        elif self._makes_no_tensor(node):
            self.inlined.add(node)
        else:
            self._layer(node)

    def finish(self, loss: Loss, adapt: Iterable[str] | None, steps: int) -> Program:
        """Makes the Program after the last node; parameters lie in the flat vector in the model's own order."""
        adapted = None if adapt is None else set(adapt)
        used = [name for name, _ in self.model.named_parameters() if name in self.shapes]
        offset = 0
        parameters = []
        for name in used:
            shape = self.shapes[name]
            if name in self.per_step:
                shape = (steps + 1, *shape)
            parameter = Parameter(name, shape, offset, adapted is None or name in adapted)
            parameters.append(parameter)
            offset += parameter.size
        if not parameters:
            raise CaptureError(f"{type(self.model).__name__} uses no parameters; there is nothing to meta-learn")
        if not any(p.adapted for p in parameters):
            raise CaptureError(
                f"the forward pass of {type(self.model).__name__} uses none of the parameters to adapt, "
                f"{sorted(adapted or ())}; it uses {used}"
            )
        index = {p.name: i for i, p in enumerate(parameters)}
        nodes = tuple(
            Node(name, layer, inputs, tuple(index[p] for p in params), constants)
            for name, layer, inputs, params, constants in self.nodes
        )
        return Program(nodes, tuple(parameters), self.output, loss)

    def _placeholder(self, node: fx.Node) -> None:
        """Takes up an argument of ``forward``: the first is value 0, the others are constants."""
        if not self.value:
            self.value[node] = 0
        elif node.args:
            self.attribute[node] = node.args[0]
        else:
            raise CaptureError(
                f"{type(self.model).__name__}.forward takes {node.target!r} besides its first argument; a model takes "
                "one batch: give the others default values or fix them in __init__"
            )

    def _makes_no_tensor(self, node: fx.Node) -> bool:
        """Says whether ``node`` makes a size, or a tuple that is only taken apart; the layers that use it compute it.

        Sizes are also remembered: whatever is made of sizes alone is one too.
        """
        sources = [n for n in node.all_input_nodes if n not in self.attribute]
        if sources and all(n in self.sizes for n in sources):
            self.sizes.add(node)
            return True
        if _reads_size(node):
            self.sizes.add(node)
            return True
        taken_apart = bool(node.users) and all(
            user.target is getattr or (user.target is operator.getitem and isinstance(user.args[1], int))
            for user in node.users
        )
        return taken_apart and (_makes_tuple(node) or node.op == "call_module")

    def _layer(self, node: fx.Node) -> None:
        """Makes a node of the Program: the layer that a pattern recognises, or else a derived one."""
        self._refuse_in_place(node)
        match = self.recogniser.match(node, self._module(node))
        if match is None:
            match = self._derive(node)
        if match.layer is None:
            self.value[node] = self.value[match.inputs[0]]
            return
        params = tuple(self._parameter(p, node) for p in match.params)
        if match.layer.varies:
            self.per_step.update(params)
        name = str(node.target) if node.op == "call_module" else node.name
        inputs = tuple(self.value[i] for i in match.inputs)
        self.nodes.append((name, match.layer, inputs, params, tuple(match.constants)))
        self.value[node] = len(self.nodes)

    def _parameter(self, parameter: Tensor, node: fx.Node) -> str:
        """Returns the name of a parameter that ``node`` uses, and notes its shape."""
        name = self.names.get(id(parameter))
        if name is None:
            raise CaptureError(f"a parameter used at {_node_line(node)} is not registered in the model")
        self.shapes[name] = tuple(parameter.shape)
        return name

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _refuse_random(self, node: fx.Node) -> None:
        """Raises CaptureError where ``node`` draws random numbers."""
        module = self._module(node)
        drawing = module is not None and any(_draws(m) for m in module.modules())
        if node.op != "call_module" and getattr(node.target, "__name__", str(node.target)).rstrip("_") in _RANDOM:
            drawing = _is_drawing(node)
        if drawing:
            raise CaptureError(
                f"random numbers at {_node_line(node)}: dropout in training mode has no exact meta-gradient; call "
                "model.eval() on it or take it out"
            )

    def _refuse_in_place(self, node: fx.Node) -> None:
        """Raises CaptureError where ``node`` changes a tensor in place that something else may read."""
        if not in_place(node, self._module(node)):
            return
        changed = node.all_input_nodes[0]
        shared = len(changed.users) > 1 or changed.target in _VIEWS
        if self.value.get(changed) == 0 or node.target is operator.setitem or shared:
            raise CaptureError(
                f"an in-place change at {_node_line(node)} of a tensor that is the model's input, a view, or used "
                "elsewhere; use the out-of-place form (inplace=False, x = x + y)"
            )

    def _derive(self, node: fx.Node) -> Match:
        """Makes a layer whose rules torch.func derives."""
        folded = Folded(node, self.root, self.inlined, self.attribute)
        if not folded.inputs:
            raise CaptureError(
                f"{_node_line(node)} makes a tensor that does not depend on the model's input; build it in __init__"
            )
        return Match(Derived(folded, folded.label), folded.inputs, folded.params)


def _fetch(root: nn.Module, path: str) -> Any:
    """Returns the attribute of ``root`` at a dotted path."""
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _reads_size(node: fx.Node) -> bool:
    """Says whether ``node`` is a call such as ``x.size(0)`` or an attribute such as ``x.shape``."""
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op != "call_function":
        return False
    return node.target is getattr and node.args[1] in _SIZE_ATTRIBUTES


def _makes_tuple(node: fx.Node) -> bool:
    """Says whether ``node`` is a call that returns a tuple of tensors."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _TUPLE_MAKERS and node.op in ("call_method", "call_function")


def _draws(module: nn.Module) -> bool:
    """Says whether the module draws random numbers: it is in training mode and drops something, or is an RReLU."""
    dropped = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0)
    return module.training and (isinstance(module, nn.RReLU) or (isinstance(dropped, float | int) and dropped > 0))


def _is_drawing(node: fx.Node) -> bool:
    """Says whether a call from ``_RANDOM`` draws: every one does but dropout outside of training or with ``p=0``."""
    if "dropout" not in getattr(node.target, "__name__", str(node.target)):
        return True
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    return bool(training) and bool(p)
