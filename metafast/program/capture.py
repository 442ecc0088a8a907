"""Capture makes a Program of a user's nn.Module, by torch.fx. The module itself stays untouched.

Modules and functions that have rules of their own become those layers; whatever else makes a tensor becomes a
``Derived`` layer. Sizes, shapes and tuples are not values of a Program: they are worked out again inside the layer
that uses them.
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
    """The model cannot become a Program; the text names the line in the user's model and the remedy."""


class _Tracer(fx.Tracer):
    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Remembers the lines of the model that a node comes from; torch's own record imports 160 MB to do so."""
        node = super().create_node(*args, **kwargs)
        frames = traceback.extract_stack()
        first = next((i for i, frame in enumerate(frames) if frame.name == "forward"), len(frames))
        node.stack_trace = "".join(traceback.format_list(frames[first:]))
        return node

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return not list(module.children()) or super().is_leaf_module(module, qualified_name)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        """Options of ``forward`` that have default values are fixed at those."""
        function, proxies = super().create_args_for_root(*args, **kwargs)
        return function, [p.node.args[0] if isinstance(p, fx.Proxy) and p.node.args else p for p in proxies]


def capture(
    model: nn.Module, loss: Loss, *, bn: str = "task", adapt: Iterable[str] | None = None, steps: int = 1
) -> Program:
    """The Program of ``model`` under ``loss``.

    Args:
        model: takes one batch ``[n, ...]`` and returns one tensor; ``forward`` may branch only on things known
            before the data.
        loss: one of ``metafast.kernels``' losses.
        bn: the mode of every batch norm (see ``metafast.kernels.batch_norm``); ``per_step`` gives its parameters a
            leading axis of ``steps + 1`` rows.
        adapt: names of the parameters that the inner loop moves; ``None``: all of them.
        steps: S, for ``per_step``.

    Raises:
        CaptureError: the forward pass depends on the data, changes its input in place, or draws random numbers.
    """
    graph, root = trace(model)
    builder = _Builder(model, root, bn)
    for node in graph.nodes:
        builder.visit(node)
    return builder.finish(loss, adapt, steps)


def trace(model: nn.Module) -> tuple[fx.Graph, nn.Module]:
    """The graph of the forward pass, and the module that its names are to be looked up in.

    Raises:
        CaptureError: it cannot be captured.
    """
    tracer = _Tracer()
    drawn = torch.get_rng_state()
    try:
        graph = tracer.trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError, IndexError) as error:
        remedy = next((r for symptom, r in _REMEDIES.items() if symptom in str(error)), _NO_BRANCHES)
        raise CaptureError(
            f"the forward pass of {type(model).__name__} cannot be captured at {_user_line(error)}: {error}. {remedy}"
        ) from error
    if not torch.equal(drawn, torch.get_rng_state()):
        raise CaptureError(
            f"the forward pass of {type(model).__name__} draws random numbers; they have no exact meta-gradient: draw "
            "them in __init__ or take them out"
        )
    return graph, tracer.root


def _user_line(error: BaseException) -> str:
    frames = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
    return _last_user_line(frames) or "an unknown line"


def _node_line(node: fx.Node) -> str:
    frames = re.findall(r'File "(.+?)", line (\d+), in .*\n\s*(.*)', node.stack_trace or "")
    return _last_user_line(frames) or f"node {node.name}"


def _last_user_line(frames: Iterable[tuple[Any, ...]]) -> str:
    library = os.path.dirname(torch.__file__)
    own = [f"{name}:{number} ({line})" for name, number, line in frames if not name.startswith((library, __file__))]
    return own[-1] if own else ""


class _Builder:
    """Walks the graph once and collects nodes, parameters and constants."""

    def __init__(self, model: nn.Module, root: nn.Module, bn: str) -> None:
        self.model, self.root = model, root
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
        adapted = None if adapt is None else set(adapt)
        used = [name for name, _ in self.model.named_parameters() if name in self.shapes]
        offset, parameters = 0, []
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
        """Sizes, and tuples that are only taken apart, are worked out inside the layers that use them."""
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
        name = self.names.get(id(parameter))
        if name is None:
            raise CaptureError(f"a parameter used at {_node_line(node)} is not registered in the model")
        self.shapes[name] = tuple(parameter.shape)
        return name

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _refuse_random(self, node: fx.Node) -> None:
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
        folded = Folded(node, self.root, self.inlined, self.attribute)
        if not folded.inputs:
            raise CaptureError(
                f"{_node_line(node)} makes a tensor that does not depend on the model's input; build it in __init__"
            )
        return Match(Derived(folded, folded.label), folded.inputs, folded.params)


def _fetch(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _reads_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op != "call_function":
        return False
    return node.target is getattr and node.args[1] in _SIZE_ATTRIBUTES


def _makes_tuple(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _TUPLE_MAKERS and node.op in ("call_method", "call_function")


def _draws(module: nn.Module) -> bool:
    share = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0)
    return module.training and (isinstance(module, nn.RReLU) or (isinstance(share, float | int) and share > 0))


def _is_drawing(node: fx.Node) -> bool:
    if "dropout" not in getattr(node.target, "__name__", str(node.target)):
        return True
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    return bool(training) and bool(p)
