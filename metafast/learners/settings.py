"""Lets the settings of a learner be changed at any time: each takes effect with the next batch, or is refused."""

from __future__ import annotations

import difflib
import inspect
from abc import ABCMeta
from collections.abc import Iterable, Mapping
from numbers import Integral
from types import FunctionType, MappingProxyType
from typing import Any

from torch import Tensor, nn

from metafast.executors import Executor, check_backend, check_precision
from metafast.inner.rates import Rate
from metafast.kernels.contract.layer import Loss
from metafast.learners.adapted_parameters import resolve_names
from metafast.learners.batch_norm import BatchNormMode, check_mode, modes_of
from metafast.learners.layout import named_rows
from metafast.learners.within_torch import WithinTorch
from metafast.program.losses import LossLike, as_loss, has_become_another

_PARTS = {
    "model": "optimisers and checkpoints hold its parameters; make a learner of the other module, or load its values "
    "by learner.model.load_state_dict(other.state_dict())",
    "rate": "optimisers and checkpoints hold it; set learner.lr, or write into learner.rate.value",
    "rows": "optimisers and checkpoints hold its parameters; write into them",
    "loss_modules": "they follow from the losses; set learner.loss or learner.query_loss",
    "captures": "the learner itself keeps it; learner.program is what was captured",
}
"""The parts of a learner that nobody can replace, and what to do instead."""
_READ = {
    "program": "it is what was captured of the model with the latest batch",
    "adapted_names": "set learner.adapt to names of parameters or modules",
    "loop": "set learner.steps, or what else it is made of",
}
"""What can only be read, and what to do instead of setting it."""


class _Sealing(ABCMeta):
    """Names the options of a learner where one is unknown, and seals it when its constructor has returned."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        makers = [vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)]
        known = {name for maker in makers for name in inspect.signature(maker).parameters}
        own = cls.__module__.startswith(__package__)  # a class of the user's may take what it likes
        for name in options.keys() - known if own else ():
            close = difflib.get_close_matches(name, known, 1, 0.5)
            names = sorted(known - {"self", "args", "kwargs", "options", "model"})
            raise TypeError(
                f"{cls.__name__} has no option {name!r}; {f'did you mean {close[0]!r}' if close else f'it has {names}'}"
            )
        learner = super().__call__(*args, **options)
        learner.__dict__["_sealed"] = True
        return learner


class SettledLearner(WithinTorch, metaclass=_Sealing):
    """Holds the settings of the learners that take gradient steps, each of which is checked wherever it is set.

    A class below adds a setting by a property with a setter. Its own attributes are those that its constructor sets or
    that it declares; any other public name is refused when it is set, since it is most likely a slip.
    """

    _sealed = False
    _steps: int

    @property
    def steps(self) -> int:
        """S, the number of inner steps."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        check_whole("steps", steps, 1, "the inner loop takes a whole number of steps")
        if self._sealed and steps == self._steps:
            return
        if self._sealed and (found := self._made_for_steps()):
            what, remedy = found[0]
            raise ValueError(f"steps={steps}: {what}, {self._steps} of them; {remedy}")
        self._steps = steps
        if self._sealed:
            self._follow_steps()
        self._capture_again()

    @property
    def lr(self) -> float | Tensor:
        """The inner rates of now: a number where there is one alone, else ``[1 or S, 1 or layers or P]``."""
        value = self.rate.value.detach()
        return float(value) if value.numel() == 1 else value

    @lr.setter
    def lr(self, lr: float | tuple[float, float] | Rate) -> None:
        rate = Rate.of_lr(lr)
        self.rate.start_from(rate if isinstance(lr, Rate) else Rate(lr, tuple(self.rate.axes), self.rate.learn))

    @property
    def loss(self) -> Loss:
        """The loss of the support sets, and where ``query_loss`` is ``None`` of the query sets."""
        return self._loss

    @loss.setter
    def loss(self, loss: LossLike) -> None:
        self._loss = as_loss(loss)
        self._follow_losses()

    @property
    def query_loss(self) -> Loss | None:
        """The loss that judges the query sets; ``None``: the same as ``loss``."""
        return self._query_loss

    @query_loss.setter
    def query_loss(self, loss: LossLike | None) -> None:
        self._query_loss = None if loss is None else as_loss(loss)
        self._follow_losses()

    @property
    def bn(self) -> BatchNormMode:
        """Where batch norm takes its statistics from."""
        return MappingProxyType(self._bn) if isinstance(self._bn, dict) else self._bn

    @bn.setter
    def bn(self, bn: BatchNormMode) -> None:
        check_mode(self.model, bn)
        if self._sealed:
            kept = {row.rpartition(".")[0] for row in named_rows(self.rows)}
            wanted = {name for name, mode in modes_of(self.model, bn, {}).items() if mode == "per_step"}
            with_parameters = {
                name for name in wanted if any(True for _ in self.model.get_submodule(name).parameters())
            }
            if kept != with_parameters:
                raise ValueError(
                    f"bn={bn!r}: the scales and shifts of per_step batch norm are parameters that a learner is made "
                    "with; make a new learner with this bn"
                )
        self._bn = dict(bn) if isinstance(bn, Mapping) else bn
        self._capture_again()

    @property
    def output(self) -> str | int | None:
        """Which part counts of what the model returns; ``None``: all of it."""
        return self._output

    @output.setter
    def output(self, output: str | int | None) -> None:
        if output is not None and (isinstance(output, bool) or not isinstance(output, str | int)):
            raise TypeError(f"output={output!r}: give the name or the number of a part of what the model returns")
        self._output = output
        self._capture_again()

    @property
    def backend(self) -> str | Executor:
        """The name of an executor, or one itself, or ``"auto"``."""
        return self._backend

    @backend.setter
    def backend(self, backend: str | Executor) -> None:
        check_backend(backend)
        self._backend = backend
        self._plan_again()

    @property
    def precision(self) -> str:
        """What the operands of products are rounded to."""
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        check_precision(precision)
        self._precision = precision
        self._plan_again()

    @property
    def adapted_names(self) -> frozenset[str]:
        """The names of the parameters that the inner loop moves."""
        if self._moved is not None:
            return self._moved
        return frozenset(name for name, p in self.model.named_parameters() if p.requires_grad)

    def _move(self, adapt: Iterable[str | nn.Module] | str | nn.Module | None) -> None:
        """Sets what the inner loop moves."""
        self._moved = None if adapt is None else frozenset(resolve_names(self.model, adapt))
        self._capture_again()

    def _made_for_steps(self) -> list[tuple[str, str]]:
        """Lists what the learner has one of for each inner step, each with what to do where S is to be another."""
        remedy = "make a new learner with this number of steps"
        found = []
        if self.rate.by_step or self.hyper.by_step:
            found.append(("the inner rates are told apart by step", remedy))
        if len(self.rows):
            found.append(("per_step batch norm has a scale and a shift for each step", remedy))
        return found

    def _follow_losses(self) -> None:
        """Takes the parameters of other losses for those of the learner."""
        if self._sealed:
            self._set_losses(self._loss, self._query_loss)
        self._capture_again()

    def _recognise_again(self) -> None:
        """Takes losses of torch's for what they are by now: a hook, or another option of a partial, may have come."""
        for name in ("_loss", "_query_loss"):
            loss = getattr(self, name)
            if loss is not None and has_become_another(loss):
                self.__dict__[name] = as_loss(loss.function)
                self._follow_losses()

    def _follow_steps(self) -> None:
        """Changes what goes with the number of inner steps, which is another one now."""

    def _plan_again(self) -> None:
        """Forgets which executors run what, because a setting has changed that decides it."""

    def _capture_again(self) -> None:
        """Forgets what was captured, because a setting has changed that went into it."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a setting, or an attribute of the class's own.

        Raises:
            AttributeError: there is no such attribute, or it cannot be set; the text says what to do.
        """
        known = getattr(type(self), name, None)
        if isinstance(known, property):
            if known.fset is None:
                raise AttributeError(f"learner.{name} is there to be read; {_READ.get(name, self._remedy(name))}")
            known.fset(
                self, value
            )  # not nn.Module's way, which takes a loss that is a module for a part of the learner
        elif name == "adapt":
            self._move(value)
        elif not self._sealed or name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self._check_name(name, known, value)
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Deletes an attribute that is no setting and no part of the learner."""
        if name in _PARTS or isinstance(getattr(type(self), name, None), property):
            raise AttributeError(f"learner.{name} cannot be deleted; a learner needs it")
        super().__delattr__(name)

    def _check_name(self, name: str, known: Any, value: Any) -> None:
        """Raises where ``name`` cannot be set, of which the class knows ``known``."""
        if name in _PARTS:
            raise AttributeError(f"learner.{name} cannot be replaced: {_PARTS[name]}")
        if isinstance(known, FunctionType) and not callable(value):
            raise AttributeError(f"learner.{name} is a method; {self._remedy(name)}")
        own = name in self.__dict__ or known is not None or hasattr(type(self), name) or name in self._declared()
        if own or name in {*self._parameters, *self._buffers, *self._modules}:
            return
        if isinstance(value, nn.Module | nn.Parameter) and not self._close(name):
            return  # a part of the learner that somebody adds
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r} to set; {self._remedy(name)}. An attribute of your own "
            "is set in the constructor or declared in the class"
        )

    @classmethod
    def _declared(cls) -> set[str]:
        return {name for base in cls.__mro__ for name in vars(base).get("__annotations__", ())}

    @classmethod
    def _settings(cls) -> list[str]:
        """Lists the names of the settings that may be set at any time, in alphabetical order."""
        found = {n for base in cls.__mro__ for n, v in vars(base).items() if isinstance(v, property) and v.fset}
        return sorted({*found, "adapt"})

    @classmethod
    def _close(cls, name: str) -> list[str]:
        """Returns the setting that ``name`` is most likely meant to be, if any."""
        settings = cls._settings()
        words = [word for word in reversed(name.lower().split("_")) if word in settings]
        return words[:1] or difflib.get_close_matches(name.lower(), settings, 1, 0.55)

    @classmethod
    def _remedy(cls, name: str) -> str:
        close = cls._close(name)
        return f"did you mean learner.{close[0]}?" if close else f"its settings are {', '.join(cls._settings())}"


def check_whole(name: str, value: Any, least: int, what: str) -> None:
    """Raises ValueError where ``value`` is no whole number or below ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: {what}, at least {least}")
