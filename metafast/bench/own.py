"""Makes a workload of the user's own model."""

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
    """Makes a model by calling the function ``name`` of a Python file, with the same random numbers on every call. It
    can be sent to another process, which loads the file again."""

    file: Path
    name: str

    def __call__(self) -> nn.Module:
        """Returns the model.

        Raises:
            ValueError: the file or its function does not exist or raises, or what it returns is not an ``nn.Module``
                with finite parameters.
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
        """Imports the file. Its folder goes to the front of ``sys.path``, as if Python had been started with the file,
        so that its own imports work."""
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
        """Names the file and the last of its lines that took part in ``error``."""
        if isinstance(error, SyntaxError) and error.filename is not None:
            return f"{error.filename}:{error.lineno}"
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(self.file)]
        return f"{self.file}:{lines[-1]}" if lines else f"{self.name}() in {self.file}"


def own_workload(
    model: str, input_shape: str, ways: int, shots: int, queries: int, tasks: int, steps: int, lr: float
) -> Workload:  # fmt: skip
    """Makes a workload of the model that ``file.py:factory`` returns, on random tasks.

    Args:
        model: ``file.py:factory``.
        input_shape: the shape of one sample, such as ``1,28,28``.
        ways: the classes of a task; 0 for regression.
        shots, queries, tasks, steps, lr: as in :class:`Workload`.

    Raises:
        ValueError: an option has an impossible value; the text names it.
    """
    file, _, name = model.rpartition(":")
    if not file:
        raise ValueError(f"model {model!r}: give file.py:factory, where factory() gives the model")
    try:
        sample = tuple(int(extent) for extent in input_shape.split(","))
    except ValueError:
        raise ValueError(f"--input-shape {input_shape!r}: give the shape of one sample, such as 1,28,28") from None
    at_least_one = {"shots": shots, "queries": queries, "tasks": tasks, "steps": steps, "input-shape": min(sample)}
    for option, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"--{option} {value}: must be at least 1")
    if ways < 0 or ways == 1:
        raise ValueError(f"--ways {ways}: give at least 2 classes, or 0 for regression")
    if not 0 < lr < math.inf:
        raise ValueError(f"--lr {lr:g}: give a positive, finite rate")
    factory = FileFactory(Path(file).resolve(), name)
    _check_sample(factory, sample)
    loss = "cross_entropy" if ways else "mse"
    return Workload(f"{Path(file).stem}:{name}", factory, loss, sample, ways, shots, queries, tasks, steps, lr)


@torch.no_grad()
def _check_sample(factory: FileFactory, sample: tuple[int, ...]) -> None:
    """Raises ValueError if the model does not map two samples ``[2, *sample]`` to one tensor."""
    model, shape = factory().float(), ",".join(map(str, sample))
    try:
        output = model(torch.zeros(2, *sample))
    except Exception as error:
        raise ValueError(f"--input-shape {shape}: {factory} cannot take it: {type(error).__name__}: {error}") from error
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"{factory} makes a {type(output).__name__} of its input; it must make one tensor")
