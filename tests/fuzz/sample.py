"""A random program as data: the source of its model, the shape of its tasks, the settings of its learner."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from fuzz import parts
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import metafast as mf

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)
NAMES = {"nn": nn, "torch": torch, "F": F, "mf": mf, **{k: v for k, v in vars(parts).items() if k[0] != "_"}}
"""What the source of a model, of a loss and of a rate may speak of."""


@dataclass(frozen=True)
class Sample:
    """One program.

    Attributes:
        model: the source of the module.
        shape: of one input.
        outputs: the number of classes, or of regression targets.
        loss: the source of the loss.
        classes: whether the targets are labels.
        rate: the source of the inner rate.
        steps: S.
        adapt: names of the parameters that the inner loop moves; ``None``: all that are not frozen.
        frozen: names of the parameters that require no gradient.
        first_order: of the learner.
        step_weights: of the learner.
        bn: of the learner.
        tasks: T.
        support: samples of a support set.
        query: samples of a query set.
        ragged: whether some of them are padding.
        dtype: the name of the dtype.
        backend: ``auto``, the name of an executor, or ``twin``: CUDA's on the CPU.
        threads: of torch.
        seed: of parameters and of data.
    """

    model: str
    shape: tuple[int, ...]
    outputs: int
    loss: str = '"mse"'
    classes: bool = False
    rate: str = "0.05"
    steps: int = 1
    adapt: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()
    first_order: bool = False
    step_weights: tuple[float, ...] | None = None
    bn: str | None = None
    tasks: int = 2
    support: int = 5
    query: int = 4
    ragged: bool = False
    dtype: str = "float64"
    backend: str = "auto"
    threads: int = 1
    seed: int = 0

    def __str__(self) -> str:
        """The few lines that make the sample again."""
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return "from fuzz.check import fault\nfrom fuzz.sample import Sample\nprint(fault(Sample(\n    " + (
            ",\n    ".join(shown) + ",\n)))"
        )

    def make_model(self) -> nn.Module:
        """Builds the module; statistics, scales and shifts of norms are not those that they start with."""
        torch.manual_seed(self.seed)
        model: nn.Module = eval(self.model, dict(NAMES))
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, _NORMS):
                if module.weight is not None:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -0.5, 0.5)
        model = model.to(getattr(torch, self.dtype))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        return model

    def make_loss(self) -> Any:
        return eval(self.loss, dict(NAMES))

    def make_rate(self) -> Any:
        return eval(self.rate, dict(NAMES))

    def make_tasks(self) -> mf.TaskBatch:
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)

        def part(n: int) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.randn(self.tasks, n, *self.shape, generator=generator, dtype=torch.float64).to(dtype)
            if self.classes:
                return x, torch.randint(0, self.outputs, (self.tasks, n), generator=generator)
            return x, torch.randn(self.tasks, n, self.outputs, generator=generator, dtype=torch.float64).to(dtype)

        masks = [self._mask(n, generator) for n in (self.support, self.query)] if self.ragged else []
        return mf.TaskBatch(*part(self.support), *part(self.query), *masks)

    def _mask(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """At least two thirds of the samples count, anywhere among the others."""
        order = torch.rand(self.tasks, n, generator=generator).argsort(1)
        counts = torch.randint(n - n // 3, n + 1, (self.tasks, 1), generator=generator)
        return order < counts

    def with_settings(self, **changes: Any) -> Sample:
        return replace(self, **changes)


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def dice(seed: int) -> random.Random:
    """The generator of all that a seed decides about a program."""
    return random.Random(f"program {seed}")
