"""A workload from the user's own model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from metafast.benchmarks.workloads import Workload


@dataclass(frozen=True)
class FileFactory:
    """Calls ``name()`` of a Python file, with the same random numbers each time; other processes load it anew."""

    file: Path
    name: str

    def __call__(self) -> nn.Module:
        """The model.

        Raises:
            ValueError: the file, or the function in it, is not there, or does not give an ``nn.Module``.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self._function()()
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.name}() in {self.file} gives a {type(model).__name__}; it must give an nn.Module")
        return model

    def _function(self) -> Callable[[], object]:
        spec = importlib.util.spec_from_file_location(self.file.stem, self.file)
        if not self.file.is_file() or spec is None or spec.loader is None:
            raise ValueError(f"there is no Python file {self.file}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, self.name, None)
        if not callable(function):
            raise ValueError(f"{self.file} has no function {self.name!r} to call for the model")
        return function


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
    factory = FileFactory(Path(file).resolve(), name)
    loss = "cross_entropy" if ways else "mse"
    return Workload(f"{Path(file).stem}:{name}", factory, loss, sample, ways, shots, queries, tasks, steps, lr)
