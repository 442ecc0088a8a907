"""Recognises nodes of the traced graph as layers that have rules, by the patterns that each layer declares.

Only this module knows how torch.fx writes an argument; ``metafast.kernels.contract.pattern`` says what a pattern is.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, fx, nn

from metafast.kernels import modules
from metafast.kernels.contract.layer import Layer
from metafast.kernels.contract.pattern import SAMPLES, Pattern

_PASSED_ON = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
              nn.FeatureAlphaDropout)  # fmt: skip
"""Modules that return their input: dropout is one of them outside of training, and capture refuses it in training."""
_ADDED_FREELY = {"__module__", "__doc__", "__init__", "__annotations__", "__constants__", "extra_repr", "__qualname__",
                 "__firstlineno__", "__static_attributes__"}  # fmt: skip
"""The attributes that a subclass may define and still compute what its base computes."""


@dataclass(frozen=True)
class Match:
    """Says which layer a graph node becomes.

    Attributes:
        layer: the layer; ``None`` where the node returns its only input.
        inputs: the graph nodes whose values it reads, in the order that its rules take them.
        params: its parameters, in the order that its rules take them.
        constants: its constants, in the order that its rules take them.
    """

    layer: Layer | None
    inputs: Sequence[fx.Node]
    params: Sequence[Tensor] = ()
    constants: Sequence[Tensor] = ()


@dataclass
class _Catalogue:
    """Holds the patterns of all layers; ``None`` stands for a module that returns its input.

    Attributes:
        modules: the pattern of each class of modules.
        functions: the pattern of each function.
        methods: the pattern of each method of a tensor, by name.
    """

    modules: dict[type, Pattern | None] = field(default_factory=dict)
    functions: dict[Any, Pattern | None] = field(default_factory=dict)
    methods: dict[str, Pattern | None] = field(default_factory=dict)


@cache
def catalogue() -> _Catalogue:
    """Collects the ``PATTERNS`` in every layer's ``reference.py``, once for all.

    Raises:
        ValueError: two patterns match the same module, function or method.
    """
    found = _Catalogue(modules=dict.fromkeys(_PASSED_ON))
    for reference in modules("reference"):
        for pattern in getattr(reference, "PATTERNS", ()):
            _enter(found.modules, pattern.modules, pattern)
            _enter(found.functions, pattern.functions, pattern)
            _enter(found.methods, pattern.methods, pattern)
    return found


def _enter(known: dict[Any, Pattern | None], matched: Sequence[Any], pattern: Pattern) -> None:
    """Adds ``pattern`` to ``known`` under everything that it matches."""
    for key in matched:
        if known.setdefault(key, pattern) is not pattern:
            raise ValueError(f"{key} is matched by two patterns of metafast.kernels; take it out of one")


class Recogniser:
    """Matches the nodes of one graph with the patterns of the layers.

    Args:
        attributes: the parameter, buffer or constant that a node fetches, by node.
        values: the nodes that make values of the Program.
        bn: the learner's mode of batch norm.
    """

    def __init__(self, attributes: Mapping[fx.Node, Any], values: Container[fx.Node], bn: str) -> None:
        self.attributes = attributes
        self.values = values
        self.bn = bn

    def match(self, node: fx.Node, module: nn.Module | None) -> Match | None:
        """Returns the layer that ``node`` becomes, with what it reads; ``None`` where no pattern covers it.

        ``module`` is the module that the node calls, if it calls one.
        """
        if module is not None:
            return self._module(node, module)
        known = catalogue()
        pattern = known.methods.get(str(node.target)) if node.op == "call_method" else known.functions.get(node.target)
        return None if pattern is None else self._call(node, pattern)

    def _module(self, node: fx.Node, module: nn.Module) -> Match | None:
        """Matches a call of a module: the pattern reads its options from the module's attributes."""
        known = catalogue().modules
        kind = _declared_class(module)
        if kind is None or len(node.args) != 1 or node.kwargs or node.args[0] not in self.values:
            return None
        pattern = known[kind]
        if pattern is None:
            return Match(None, [node.args[0]])  # type: ignore[list-item]
        given = {"bn": self.bn, "name": node.target}
        parameters = inspect.signature(pattern.read).parameters
        named = {name: given.get(name, getattr(module, name, p.default)) for name, p in parameters.items()}
        named[pattern.inputs[0]] = node.args[0]
        return self._matched(pattern, pattern.read(**named), named)

    def _call(self, node: fx.Node, pattern: Pattern) -> Match | None:
        """Matches a call of a function or a method: the pattern reads its options from the arguments."""
        args = [self._argument(node, argument) for argument in node.args]
        kwargs = {name: self._argument(node, argument) for name, argument in node.kwargs.items()}
        try:
            bound = inspect.signature(pattern.read).bind(*args, **kwargs)
        except TypeError:  # the call has an option that the pattern does not know
            return None
        bound.apply_defaults()
        options = [value for name, value in bound.arguments.items() if name not in pattern.inputs]
        if not all(self._is_value(bound.arguments[name]) for name in pattern.inputs) or _nodes(options):
            return None
        match = self._matched(pattern, pattern.read(*bound.args, **bound.kwargs), bound.arguments)
        return match if match is not None and _keeps_tensors(match, options) else None

    def _matched(self, pattern: Pattern, layer: Layer | None, arguments: Mapping[str, Any]) -> Match | None:
        """Picks inputs, parameters and constants of ``layer`` from the arguments by name."""
        if layer is None:
            return None
        names = pattern.inputs, layer.parameter_names, layer.constant_names
        return Match(layer, *([arguments[name] for name in group] for group in names))

    def _is_value(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and argument in self.values

    def _argument(self, node: fx.Node, argument: Any) -> Any:
        """Puts in the place of nodes that fetch a constant the constant, and ``SAMPLES`` for the samples' number."""

        def replacement(source: fx.Node) -> Any:
            return SAMPLES if _counts_samples(source, node) else self.attributes.get(source, source)

        return fx.node.map_arg(argument, replacement)


def _declared_class(module: nn.Module) -> type | None:
    """Returns the class with a pattern whose forward pass ``module`` has: its own, or a base to which it adds nothing.

    A subclass that defines anything else may compute something else, and gets ``None``.
    """
    known = catalogue().modules
    for kind in type(module).__mro__:
        if kind in known:
            return kind
        if not vars(kind).keys() <= _ADDED_FREELY:
            return None
    return None


def _nodes(arguments: Sequence[Any]) -> list[fx.Node]:
    """Lists the graph nodes anywhere in the arguments; their values are known only when the data comes."""
    found: list[fx.Node] = []
    fx.node.map_arg(tuple(arguments), lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found


def _keeps_tensors(match: Match, options: Sequence[Any]) -> bool:
    """Says whether the layer takes every tensor among the options, and nothing but parameters for its parameters."""
    taken = {id(tensor) for tensor in (*match.params, *match.constants)}
    tensors = [option for option in options if isinstance(option, Tensor)]
    return all(id(t) in taken for t in tensors) and all(isinstance(p, nn.Parameter) for p in match.params)


def _counts_samples(source: fx.Node, reader: fx.Node) -> bool:
    """Says whether ``source`` is ``x.size(0)`` or ``x.shape[0]`` of the first argument ``x`` of ``reader``."""
    x = reader.args[0] if reader.args else None
    if source.target == "size":
        return source.args == (x, 0)
    if source.target is not operator.getitem or source.args[1] != 0 or not isinstance(source.args[0], fx.Node):
        return False
    return source.args[0].target is getattr and source.args[0].args == (x, "shape")
