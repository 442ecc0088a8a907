"""Takes the random numbers of a model from a counter: each operation that draws is computed of numbers that are given.

Such an operation becomes one or more draws, which are nodes of a Program, and plain operations on what they return. The
same is done to a module that runs beside its Program, so that both see the same numbers.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.utils._python_dispatch import TorchDispatchMode

from metafast.kernels.dropout import dropped
from metafast.kernels.noise import Noise
from metafast.program.operation import by_name

aten = torch.ops.aten
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """Stands for a draw among recorded operations; it may be given the tensor whose shape it takes."""

    noise: Noise

    __name__ = "noise"

    def numbers(self, seeds: Tensor | None, step: int) -> Tensor:
        """Returns the numbers of the task with the one seed ``[1]``, in the recorded shape."""
        assert seeds is not None
        assert self.noise.shape is not None
        return self.noise.values(seeds, step, self.noise.shape)[0]


class Source(ABC):
    """Gives the numbers.

    Attributes:
        silent: whether what is done now is its own work, and none of the module's.
    """

    silent = False

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Takes what is done in the ``with`` block for its own work."""
        before, self.silent = self.silent, True
        try:
            yield
        finally:
            self.silent = before

    @abstractmethod
    def numbers(self, noise: Noise, like: Tensor | None, device: torch.device) -> Tensor:
        """Returns what the next draw makes, ``noise`` with the number of that draw; ``like`` has given the shape."""

    def whole(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Calls ``function``, which stands for one operation."""
        return function(*tensors)

    def draw(self, distribution: str, like: Tensor, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        """Draws numbers in the shape of ``like``."""
        layer = Noise(0, distribution, dtype or _real(like.dtype), None, **options)
        shape = layer.shape_like(tuple(like.shape))
        return self.numbers(Noise(0, distribution, layer.dtype, shape, **options), like, like.device)

    def fill(self, distribution: str, like: Tensor, **options: Any) -> Tensor:
        """Draws numbers to fill ``like`` with, whose values nobody needs."""
        return self.shaped(distribution, tuple(like.shape), _real(like.dtype), like.device, **options)

    def shaped(
        self, distribution: str, shape: tuple[int, ...], dtype: torch.dtype | None, device: Any, **options: Any
    ) -> Tensor:
        """Draws numbers of a shape that does not follow from any value."""
        dtype = dtype or torch.get_default_dtype()
        device = torch.get_default_device() if device is None else torch.device(device)
        return self.numbers(Noise(0, distribution, dtype, tuple(shape), **options), None, device)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def replacement(func: Any) -> Callable[[Source, Arguments], Any] | None:
    """Returns what computes ``func`` of given numbers; ``None`` where nothing does."""
    packet = func.overloadpacket
    if packet in _RECURRENT and func._overloadname == "input":
        return lambda source, a: _recurrent(source, a, func)
    return _REPLACED.get(packet)


def _dropout(source: Source, a: Arguments, features: int | None = None) -> Tensor:
    x, rate = a["input"], a["p"]
    if features is not None and x.dim() < features:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    scale = 0.0 if rate == 1 else 1 / (1 - rate)
    noise = source.draw("kept", x, x.dtype, features=features, rate=rate, scale=scale)
    return source.whole(dropped, x, noise)


_SELU = 1.7580993408473766
"""What alpha dropout puts in the place of what it drops, without its sign."""


def _alpha_dropout(source: Source, a: Arguments, features: int | None = None) -> Tensor:
    """``a (x m + s (m - 1)) + a s p`` with the mask ``m``; ``a`` keeps the variance and ``a s p`` the mean."""
    x, rate = a["input"], a["p"]
    if rate == 1:
        return _dropout(source, a, features)
    scale = 1 / math.sqrt((_SELU * _SELU * rate + 1) * (1 - rate))
    noise = source.draw("kept", x, x.dtype, features=features, rate=rate, scale=scale)
    return source.whole(dropped, x, noise) + (noise * _SELU + _SELU * scale * (rate - 1))


def _native_dropout(source: Source, a: Arguments) -> tuple[Tensor, Tensor]:
    x, rate = a["input"], a["p"]
    noise = source.draw("kept", x, x.dtype, rate=rate, scale=0.0 if rate == 1 else 1 / (1 - rate))
    return source.whole(dropped, x, noise), noise > 0


def _rrelu(source: Source, a: Arguments) -> Tensor:
    x, lower, upper = a["input"], a["lower"], a["upper"]
    return torch.where(x > 0, x, x * (source.draw("uniform", x) * (upper - lower) + lower))


def _attention(source: Source, a: Arguments) -> Tensor:
    query, key, value, rate = a["query"], a["key"], a["value"], a["dropout_p"]
    weights = aten._scaled_dot_product_attention_math.default(
        query, key, value, a["attn_mask"], 0.0, a["is_causal"], scale=a["scale"], enable_gqa=a["enable_gqa"]
    )[1]
    if a["enable_gqa"]:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return _dropout(source, {"input": weights, "p": rate}) @ value


def _recurrent(source: Source, a: Arguments, func: Any) -> tuple[Tensor, ...]:
    """Runs a recurrent network layer by layer, and drops between the layers."""
    x, states, layers = a["input"], a["hx"], a["num_layers"]
    rows = 2 if a["bidirectional"] else 1
    each = len(a["params"]) // layers
    last: list[Any] = []
    for layer in range(layers):
        at = slice(layer * rows, (layer + 1) * rows)
        before = [state[at] for state in states] if isinstance(states, list | tuple) else states[at]
        weights = a["params"][layer * each : (layer + 1) * each]
        x, *after = func(x, before, weights, a["has_biases"], 1, 0.0, a["train"], a["bidirectional"], a["batch_first"])
        last.append(after)
        if layer < layers - 1:
            x = _dropout(source, {"input": x, "p": a["dropout"]})
    return (x, *(torch.cat(parts) for parts in zip(*last, strict=True)))


def _uniform_like(source: Source, a: Arguments) -> Tensor:
    return source.draw("uniform", a["input"], a["dtype"])


def _normal_like(source: Source, a: Arguments) -> Tensor:
    return source.draw("normal", a["input"], a["dtype"])


def _rand(source: Source, a: Arguments) -> Tensor:
    return source.shaped("uniform", a["size"], a["dtype"], a["device"])


def _randn(source: Source, a: Arguments) -> Tensor:
    return source.shaped("normal", a["size"], a["dtype"], a["device"])


def _integers(uniform: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Makes whole numbers from ``low`` to below ``high`` of float64 numbers in ``[0, 1)``."""
    return ((uniform * (high - low)).floor() + low).to(dtype)


def _integer(dtype: Any) -> torch.dtype:
    """Returns the dtype that was asked for; where none was, the schema has a number in its place."""
    return dtype if isinstance(dtype, torch.dtype) else torch.int64


def _randint(source: Source, a: Arguments) -> Tensor:
    uniform = source.shaped("uniform", a["size"], torch.float64, a["device"])
    return _integers(uniform, a.get("low", 0), a["high"], _integer(a["dtype"]))


def _randint_like(source: Source, a: Arguments) -> Tensor:
    x = a["input"]
    uniform = source.draw("uniform", x, torch.float64)
    return _integers(uniform, a.get("low", 0), a["high"], a["dtype"] or x.dtype)


def _random(source: Source, a: Arguments) -> Tensor:
    x = a["input"]
    if a.get("to") is None:
        raise ValueError("random_ has no upper bound; write random_(from, to)")
    uniform = source.shaped("uniform", tuple(x.shape), torch.float64, x.device)
    return _integers(uniform, a.get("from", 0), a["to"], x.dtype)


def _randperm(source: Source, a: Arguments) -> Tensor:
    order = source.shaped("uniform", (a["n"],), torch.float64, a["device"]).argsort()
    return order.to(_integer(a["dtype"]))


def _normal(source: Source, a: Arguments) -> Tensor:
    mean, std = a["mean"], a["std"]
    if "size" in a:
        return source.shaped("normal", a["size"], a["dtype"], a["device"]) * std + mean
    mean, std = (t.detach() if isinstance(t, Tensor) else t for t in (mean, std))  # torch has no gradient there either
    if not isinstance(mean, Tensor):
        return source.draw("normal", std) * std + mean
    wide = mean if not isinstance(std, Tensor) else mean.expand(torch.broadcast_shapes(mean.shape, std.shape))
    return source.draw("normal", wide) * std + mean


def _bernoulli(source: Source, a: Arguments) -> Tensor:
    x, p = a["input"], a.get("p")
    if isinstance(p, float):
        return source.draw("kept", x, x.dtype, rate=1 - p)
    rates = (x if p is None else p).detach()
    return (source.draw("uniform", x) < rates).to(x.dtype)


def _bernoulli_in_place(source: Source, a: Arguments) -> Tensor:
    x, p = a["input"], a["p"]
    if isinstance(p, Tensor):
        return source.fill("uniform", x) < p.detach()
    return source.fill("kept", x, rate=1 - p)


def _multinomial(source: Source, a: Arguments) -> Tensor:
    """The classes whose exponential waiting times, at rates like the weights, are over first."""
    weights, count = a["input"].detach(), a["num_samples"]
    if a["replacement"]:
        shape = (*weights.shape[:-1], count, weights.shape[-1])
        waiting = -source.shaped("open", shape, weights.dtype, weights.device).log()
        return (weights[..., None, :] / waiting).argmax(-1)
    waiting = -source.draw("open", weights).log()
    return (weights / waiting).topk(count, -1).indices


def _in_place(compute: Callable[[Source, Arguments], Tensor]) -> Callable[[Source, Arguments], Tensor]:
    """Writes what ``compute`` returns to the argument."""
    return lambda source, a: a["input"].copy_(compute(source, a))


_REPLACED: dict[Any, Callable[[Source, Arguments], Any]] = {
    aten.dropout: _dropout,
    aten.feature_dropout: lambda s, a: _dropout(s, a, 2),
    aten.alpha_dropout: _alpha_dropout,
    aten.feature_alpha_dropout: lambda s, a: _alpha_dropout(s, a, 2),
    aten.native_dropout: _native_dropout,
    aten.dropout_: _in_place(_dropout),
    aten.feature_dropout_: _in_place(lambda s, a: _dropout(s, a, 2)),
    aten.alpha_dropout_: _in_place(_alpha_dropout),
    aten.feature_alpha_dropout_: _in_place(lambda s, a: _alpha_dropout(s, a, 2)),
    aten.rrelu: _rrelu,
    aten.rrelu_: _in_place(_rrelu),
    aten.scaled_dot_product_attention: _attention,
    aten.rand: _rand,
    aten.randn: _randn,
    aten.rand_like: _uniform_like,
    aten.randn_like: _normal_like,
    aten.randint: _randint,
    aten.randint_like: _randint_like,
    aten.randperm: _randperm,
    aten.normal: _normal,
    aten.bernoulli: _bernoulli,
    aten.multinomial: _multinomial,
    aten.bernoulli_: _in_place(_bernoulli_in_place),
    aten.random_: _in_place(_random),
    aten.normal_: _in_place(lambda s, a: s.fill("normal", a["input"]) * a["std"] + a["mean"]),
    aten.uniform_: _in_place(lambda s, a: s.fill("uniform", a["input"]) * (a["to"] - a["from"]) + a["from"]),
    aten.exponential_: _in_place(lambda s, a: -s.fill("open", a["input"]).log() / a["lambd"]),
    aten.log_normal_: _in_place(lambda s, a: (s.fill("normal", a["input"]) * a["std"] + a["mean"]).exp()),
    aten.cauchy_: _in_place(
        lambda s, a: ((s.fill("open", a["input"]) - 0.5) * math.pi).tan() * a["sigma"] + a["median"]
    ),
    aten.geometric_: _in_place(lambda s, a: (s.fill("open", a["input"]).log() / math.log1p(-a["p"])).ceil()),
}
_RECURRENT = {aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu}


class GivenNumbers(SchemaCheckMode, Source):
    """Lets a module that runs draw the numbers of one task and inner step, as its Program does (see ``Recorder``)."""

    def __init__(self, seed: Tensor, step: int) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self.seed, self.step = seed.reshape(1), step
        self.order: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __enter__(self) -> GivenNumbers:
        TorchDispatchMode.__enter__(self)
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        compute = replacement(func) if not self.silent and draws(func, args, kwargs) else None
        if compute is None:
            return func(*args, **kwargs)
        with self:
            return compute(self, by_name(func, args, kwargs))

    def numbers(self, noise: Noise, like: Tensor | None, device: torch.device) -> Tensor:
        # What is computed again on the way back finds the generator as it was, and so finds the same draws.
        with self.unseen():
            position = int(torch.randint(1 << 62, ()))
        number = self.order.setdefault(position, len(self.order))
        return Draw(replace(noise, number=number)).numbers(self.seed.to(device), self.step)


@contextmanager
def given_numbers(seed: Tensor | None, step: int = 0) -> Iterator[None]:
    """Runs the ``with`` block on the numbers of the task with that ``seed``; without a seed it changes nothing.

    torch's default generator is as before when the block is left.
    """
    if seed is None:
        yield
        return
    before = torch.get_rng_state()
    try:
        with above_autograd(GivenNumbers(seed, step)):
            yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def above_autograd(mode: TorchDispatchMode) -> Iterator[None]:
    """Shows ``mode``, which is one of torch's PreDispatch key, each operation before autograd splits it up."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch._C._EnablePythonDispatcher())
        stack.enter_context(torch._C._EnablePreDispatch())
        stack.enter_context(mode)
        yield


_RATES = ("dropout_p", "dropout", "p")


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Says whether a call draws random numbers: of those that can, many do in training alone, or at a rate above 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    named = by_name(func, args, kwargs)
    rates = [named[name] for name in _RATES if isinstance(named.get(name), float) and "generator" not in named]
    training = named.get("train", named.get("training", True)) is not False
    return training and all(rate > 0 for rate in rates)
