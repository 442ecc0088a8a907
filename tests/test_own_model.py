"""The user's own model as a workload: what is wrong with it is one line that names the file and the line in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metafast.bench import Settings, own_workload
from metafast.bench.peers import Metafast
from metafast.bench.run import measure

FACTORY = """from torch import nn
def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
number = 3
def broken():
    return {}["conv"]
def leave():
    raise SystemExit("no configuration")
def nan():
    model = net()
    nn.init.constant_(model[1].bias, float("nan"))
    return model
class Two(nn.Sequential):
    def forward(self, x):
        return x, x
def two():
    return Two()
"""


def test_own_model(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FACTORY)
    w = own_workload(f"{file}:net", "3,2,2", ways=4, shots=2, queries=3, tasks=5, steps=1, lr=0.1)
    first, second = (dict(w.network().named_parameters()) for _ in range(2))
    assert torch.equal(first["1.weight"], second["1.weight"])
    tasks = w.draw()
    assert tasks.query_x.shape == (5, 12, 3, 2, 2)
    losses, gradient = Metafast().prepare(w, tasks)()
    assert losses.shape == (5,)
    assert gradient["1.weight"].shape == (4, 12)
    regression = own_workload(f"{file}:net", "3,2,2", ways=0, shots=2, queries=3, tasks=5, steps=1, lr=0.1)
    assert regression.draw().support_y.shape == (5, 2, 4)


def test_own_model_may_import_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And define what looks for its module by name, as a dataclass does."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_mine.py").write_text(FACTORY)
    (tmp_path / "uses.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport beside_mine\n"
        "@dataclass\nclass Settings:\n    ways: int = 4\ndef make():\n    Settings()\n    return beside_mine.net()\n"
    )
    own_workload(f"{tmp_path / 'uses.py'}:make", "3,2,2", ways=4, shots=2, queries=3, tasks=5, steps=1, lr=0.1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "mine.py"}, "file.py:factory"),
        ({"model": "{}/none.py:net"}, "no Python file"),
        ({"model": "{}/mine.py:nothing"}, "no function 'nothing'"),
        ({"model": "{}/mine.py:number"}, "no function 'number'"),
        ({"model": "{}/syntax.py:net"}, r"syntax.py:2 raises SyntaxError"),
        ({"model": "{}/mine.py:broken"}, r"mine.py:6 raises KeyError: 'conv'"),
        ({"model": "{}/mine.py:leave"}, r"mine.py:8 raises SystemExit"),
        ({"model": "{}/mine.py:nan"}, r"whose 1.bias is not finite"),
        ({"model": "{}/mine.py:two"}, r"makes a tuple of its input"),
        ({"input_shape": "3,2,3"}, "--input-shape 3,2,3: the model of net"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"input_shape": "3x2"}, "--input-shape"),
        ({"shots": 0}, "--shots 0"),
        ({"ways": 1}, "--ways 1"),
        ({"ways": 5}, "support_y"),
    ],
)
def test_own_model_errors(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    (tmp_path / "syntax.py").write_text("import torch\ndef net(:\n")
    options = {"model": "{}/mine.py:net", "input_shape": "3,2,2", "ways": 4, "shots": 2, "queries": 3, "tasks": 5,
               "steps": 1, "lr": 0.1, **change}  # fmt: skip
    options["model"] = options["model"].format(tmp_path)
    with pytest.raises(ValueError, match=text):
        measure([own_workload(**options)], [], Settings(threads=1), lambda text: None)
