"""A workload from the user's own model."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from traceback import extract_tb
from types import ModuleType

import torch
from torch import nn

from metafast.bench.workloads import Workload


@dataclass(frozen=True)
class FileFactory:
    """Calls ``name()`` of a Python file, with the same random numbers each time; other processes load it anew."""

    file: Path
    name: str

    def __call__(self) -> nn.Module:
        """The model.

        Raises:
            ValueError: the file, or the function in it, is not there, raises, or does not give an ``nn.Module`` with
                finite parameters.
        """
        if not self.file.is_file():
            raise ValueError(f"there is no Python file {self.file}")
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                function = getattr(self._module(), self.name, None)
                model = function() if callable(function) else None
        except (Exception, SystemExit) as error:
            raise ValueError(f"{self._where(error)} raises {type(error).__name__}: {error}") from error
        if not callable(function):
            raise ValueError(f"{self.file} has no function {self.name!r} to call for the model")
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.name}() in {self.file} gives a {type(model).__name__}; it must give an nn.Module")
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{self.name}() in {self.file} gives a model whose {name} is not finite (NaN or inf)")
        return model

    def __str__(self) -> str:
        return f"the model of {self.name}() in {self.file}"

    def _module(self) -> ModuleType:
        """The file's, found by what it imports and defines as if Python had been started with it."""
        name = f"_metafast_{self.file.stem}"
        spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, str(self.file)))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if str(self.file.parent) not in sys.path:
            sys.path.insert(0, str(self.file.parent))
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    def _where(self, error: BaseException) -> str:
        """The file and its last line that took part in ``error``."""
        if isinstance(error, SyntaxError) and error.filename is not None:
            return f"{error.filename}:{error.lineno}"
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(self.file)]
        return f"{self.file}:{lines[-1]}" if lines else f"{self.name}() in {self.file}"


def own_workload(
    model: str, input_shape: str, ways: int, shots: int, queries: int, tasks: int, steps: int, lr: float
) -> Workload:  # fmt: skip
    """``file.py:factory`` on made-up tasks; ``ways=0`` is regression. ``input_shape`` is that of a sample: ``1,28,28``.

    Raises:
        ValueError: an option that cannot be; the text names it.
    """
    file, _, name = model.rpartition(":")
    if not file:
        raise ValueError(f"model {model!r}: give file.py:factory, where factory() gives the model")
    try:
        sample = tuple(int(extent) for extent in input_shape.split(","))
    except ValueError:
        raise ValueError(f"--input-shape {input_shape!r}: give the shape of one sample, such as 1,28,28") from None
    given = {"shots": shots, "queries": queries, "tasks": tasks, "steps": steps, "input-shape": min(sample)}
    for option, value in given.items():
        if value < 1:
            raise ValueError(f"--{option} {value}: must be at least 1")
    if ways < 0 or ways == 1:
        raise ValueError(f"--ways {ways}: give at least 2 classes, or 0 for regression")
    if not 0 < lr < math.inf:
        raise ValueError(f"--lr {lr:g}: give a positive, finite rate")
    factory = FileFactory(Path(file).resolve(), name)
    _try(factory, sample)
    loss = "cross_entropy" if ways else "mse"
    return Workload(f"{Path(file).stem}:{name}", factory, loss, sample, ways, shots, queries, tasks, steps, lr)


@torch.no_grad()
def _try(factory: FileFactory, sample: tuple[int, ...]) -> None:
    """Raises ValueError where the model does not make one tensor of two samples."""
    model, shape = factory().float(), ",".join(map(str, sample))
    try:
        output = model(torch.zeros(2, *sample))
    except Exception as error:
        raise ValueError(f"--input-shape {shape}: {factory} cannot take it: {type(error).__name__}: {error}") from error
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"{factory} makes a {type(output).__name__} of its input; it must make one tensor")
