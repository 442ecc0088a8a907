"""Which modules and functions have rules of their own, and how their options are read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from metafast.kernels.activation import GELU, LeakyReLU, ReLU, Sigmoid, Tanh
from metafast.kernels.adaptive_avg_pool2d import AdaptiveAvgPool2d
from metafast.kernels.add import Add
from metafast.kernels.avg_pool2d import AvgPool2d
from metafast.kernels.batch_norm import BatchNorm
from metafast.kernels.contract.layer import Layer
from metafast.kernels.conv2d import Conv2d
from metafast.kernels.flatten import Flatten
from metafast.kernels.layer_norm import LayerNorm
from metafast.kernels.linear import Linear
from metafast.kernels.max_pool2d import MaxPool2d


@dataclass(frozen=True)
class Match:
    """What a graph node becomes. A ``layer`` of ``None`` passes its input on."""

    layer: Layer | None
    inputs: Sequence[fx.Node]
    params: Sequence[Tensor] = ()
    constants: Sequence[Tensor] = ()


def recognise(
    node: fx.Node, module: nn.Module | None, attributes: Mapping[fx.Node, Any], bn: str
) -> Match | None:
    """The layer with rules of its own that ``node`` is, or ``None``."""
    if module is not None:
        return _module(node, module, bn)
    name = node.target if node.op == "call_method" else _FUNCTIONS.get(node.target)
    recogniser = _CALLS.get(str(name))
    return None if recogniser is None else recogniser(_Call(node, attributes))


def _module(node: fx.Node, m: nn.Module, bn: str) -> Match | None:
    if len(node.args) != 1 or node.kwargs:
        return None
    for kind, read in _MODULES.items():
        if type(m) is kind:
            layer = read(m)
            params = [p for p in (getattr(m, "weight", None), getattr(m, "bias", None)) if p is not None]
            return None if layer is None else Match(layer, [node.args[0]], params)  # type: ignore[list-item]
    if isinstance(m, nn.Identity | nn.modules.dropout._DropoutNd):
        return Match(None, [node.args[0]])  # type: ignore[list-item]
    if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return _batch_norm(node, m, bn)
    return None


def _batch_norm(node: fx.Node, m: Any, bn: str) -> Match:
    constants: list[Tensor] = []
    layer = BatchNorm(bn, m.eps, m.weight is not None, m.bias is not None, m.momentum or 0.0)
    if layer.fixed_statistics:
        if m.running_mean is None:
            raise ValueError(
                f"bn={bn!r} needs running statistics, but {node.target!r} keeps none (track_running_stats=False); "
                'use bn="task"'
            )
        if m.momentum is None and bn == "running":
            raise ValueError(f"{node.target!r} has momentum=None; bn='running' needs a number, such as momentum=0.1")
        constants = [m.running_mean, m.running_var]
    params = [p for p in (m.weight, m.bias) if p is not None]
    return Match(layer, [node.args[0]], params, constants)  # type: ignore[list-item]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _conv2d(m: nn.Conv2d) -> Layer | None:
    if isinstance(m.padding, str) or m.padding_mode != "zeros":
        return None
    return Conv2d(_pair(m.stride), _pair(m.padding), _pair(m.dilation), m.groups, m.bias is not None)


def _max_pool(m: Any) -> Layer | None:
    if m.return_indices:
        return None
    return MaxPool2d(_pair(m.kernel_size), _pair(m.stride), _pair(m.padding), _pair(m.dilation), m.ceil_mode)


def _avg_pool(m: Any) -> Layer:
    return AvgPool2d(
        _pair(m.kernel_size), _pair(m.stride), _pair(m.padding), m.ceil_mode, m.count_include_pad, m.divisor_override
    )


def _adaptive(size: Any) -> Layer | None:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    return AdaptiveAvgPool2d(pair) if all(isinstance(s, int) for s in pair) else None


def _flatten(start: Any, end: Any) -> Layer | None:
    whole = isinstance(start, int) and isinstance(end, int)
    return Flatten(start, end) if whole and start >= 1 and (end == -1 or end >= start) else None


_MODULES: dict[type, Callable[[Any], Layer | None]] = {
    nn.Linear: lambda m: Linear(m.bias is not None),
    nn.Conv2d: _conv2d,
    nn.LayerNorm: lambda m: LayerNorm(len(m.normalized_shape), m.eps, m.weight is not None, m.bias is not None),
    nn.ReLU: lambda m: ReLU(),
    nn.LeakyReLU: lambda m: LeakyReLU(m.negative_slope),
    nn.Tanh: lambda m: Tanh(),
    nn.Sigmoid: lambda m: Sigmoid(),
    nn.GELU: lambda m: GELU() if m.approximate == "none" else None,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: lambda m: _adaptive(m.output_size),
    nn.Flatten: lambda m: _flatten(m.start_dim, m.end_dim),
}


class _Call:
    """The arguments of a function or method call, by position or by name."""

    def __init__(self, node: fx.Node, attributes: Mapping[fx.Node, Any]) -> None:
        self.node, self.attributes = node, attributes

    def get(self, position: int, name: str, default: Any = None) -> Any:
        args, kwargs = self.node.args, self.node.kwargs
        value = args[position] if len(args) > position else kwargs.get(name, default)
        return self.attributes.get(value, value) if isinstance(value, fx.Node) else value

    @property
    def x(self) -> Any:
        return self.get(0, "input", self.node.kwargs.get("self"))

    def is_value(self, value: Any) -> bool:
        return isinstance(value, fx.Node)


def _plain(layer: Layer | None, call: _Call) -> Match | None:
    return None if layer is None or not call.is_value(call.x) else Match(layer, [call.x])


def _call_linear(call: _Call) -> Match | None:
    weight, bias = call.get(1, "weight"), call.get(2, "bias")
    return _bilinear(Linear(bias is not None), call, weight, bias)


def _call_conv2d(call: _Call) -> Match | None:
    weight, bias, padding = call.get(1, "weight"), call.get(2, "bias"), call.get(4, "padding", 0)
    if isinstance(padding, str):
        return None
    layer = Conv2d(
        _pair(call.get(3, "stride", 1)), _pair(padding), _pair(call.get(5, "dilation", 1)), call.get(6, "groups", 1),
        bias is not None,
    )  # fmt: skip
    return _bilinear(layer, call, weight, bias)


def _bilinear(layer: Layer, call: _Call, weight: Any, bias: Any) -> Match | None:
    params = [p for p in (weight, bias) if p is not None]
    if not call.is_value(call.x) or not all(isinstance(p, nn.Parameter) for p in params):
        return None
    return Match(layer, [call.x], params)


def _call_add(call: _Call) -> Match | None:
    a, b = call.x, call.get(1, "other")
    scaled = call.node.kwargs.get("alpha", 1) != 1
    if scaled or not (call.is_value(a) and call.is_value(b)):
        return None
    return Match(Add(), [a, b])


def _call_max_pool(call: _Call) -> Match | None:
    kernel = call.get(1, "kernel_size")
    if call.get(6, "return_indices", False):
        return None
    layer = MaxPool2d(
        _pair(kernel), _pair(call.get(2, "stride") or kernel), _pair(call.get(3, "padding", 0)),
        _pair(call.get(4, "dilation", 1)), call.get(5, "ceil_mode", False),
    )  # fmt: skip
    return _plain(layer, call)


def _call_avg_pool(call: _Call) -> Match | None:
    kernel = call.get(1, "kernel_size")
    layer = AvgPool2d(
        _pair(kernel), _pair(call.get(2, "stride") or kernel), _pair(call.get(3, "padding", 0)),
        call.get(4, "ceil_mode", False), call.get(5, "count_include_pad", True), call.get(6, "divisor_override"),
    )  # fmt: skip
    return _plain(layer, call)


def _call_reshape(call: _Call) -> Match | None:
    """``x.view(x.size(0), -1)`` and its spellings."""
    x, sizes = call.x, list(call.node.args[1:])
    sizes = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    if len(sizes) != 2 or sizes[1] != -1 or not isinstance(sizes[0], fx.Node):
        return None
    first = sizes[0]
    by_method = first.target == "size" and first.args == (x, 0)
    by_shape = (
        first.target is operator.getitem and first.args[1] == 0 and isinstance(first.args[0], fx.Node)
        and first.args[0].target is getattr and first.args[0].args == (x, "shape")
    )  # fmt: skip
    return _plain(Flatten(), call) if by_method or by_shape else None


_CALLS: dict[str, Callable[[_Call], Match | None]] = {
    "linear": _call_linear,
    "conv2d": _call_conv2d,
    "add": _call_add,
    "add_": _call_add,
    "relu": lambda c: _plain(ReLU(), c),
    "relu_": lambda c: _plain(ReLU(), c),
    "leaky_relu": lambda c: _plain(LeakyReLU(c.get(1, "negative_slope", 0.01)), c),
    "tanh": lambda c: _plain(Tanh(), c),
    "sigmoid": lambda c: _plain(Sigmoid(), c),
    "gelu": lambda c: _plain(GELU() if c.get(1, "approximate", "none") == "none" else None, c),
    "max_pool2d": _call_max_pool,
    "avg_pool2d": _call_avg_pool,
    "adaptive_avg_pool2d": lambda c: _plain(_adaptive(c.get(1, "output_size")), c),
    "flatten": lambda c: _plain(_flatten(c.get(1, "start_dim", 0), c.get(2, "end_dim", -1)), c),
    "view": _call_reshape,
    "reshape": _call_reshape,
}

_FUNCTIONS: dict[Any, str] = {
    F.linear: "linear", F.conv2d: "conv2d", torch.conv2d: "conv2d",
    operator.add: "add", operator.iadd: "add", torch.add: "add",
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", F.leaky_relu: "leaky_relu",
    torch.tanh: "tanh", F.tanh: "tanh", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.gelu: "gelu",
    F.max_pool2d: "max_pool2d", torch.max_pool2d: "max_pool2d", F.avg_pool2d: "avg_pool2d",
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d", torch.flatten: "flatten", torch.reshape: "reshape",
}  # fmt: skip
