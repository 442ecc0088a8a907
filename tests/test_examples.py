"""The scripts of ``examples/``: each agrees with a plain torch loop, and runs through at a tiny size."""

from __future__ import annotations

import gzip
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples"
TINY = {
    "hypergradient_descent": "--steps 3 --outer-steps 2 --width 4",
    "reweight_noisy_samples": "--samples 200 --steps 2 --outer-steps 1 --epochs 1 --width 4 --data {data}",
    "distil_images": "--steps 2 --outer-steps 1 --tasks 2 --width 4 --batch 5 --data {data}",
    "learned_loss": "--steps 2 --iterations 1 --tasks 2",
    "test_time_training": "--iterations 1 --batch 2 --size 2 --hidden 4",
}
SHARED = {"common", "fashion_mnist"}


@pytest.fixture(scope="module", autouse=True)
def _found_by_name():
    """The scripts import one another as they do when one of them is run."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in {*TINY, *SHARED}:
        sys.modules.pop(name, None)


def idx(values: torch.Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.dim())) + sizes + values.to(torch.uint8).numpy().tobytes()


def written(folder: Path, count: int = 1000) -> Path:
    """Writes random pictures as the four files of Fashion-MNIST."""
    for part, size in (("train", count), ("t10k", 20)):
        pictures, labels = torch.randint(256, (size, 28, 28)), torch.arange(size) % 10
        for name, values in ((f"{part}-images-idx3-ubyte.gz", pictures), (f"{part}-labels-idx1-ubyte.gz", labels)):
            (folder / name).write_bytes(gzip.compress(idx(values), 1))
    return folder


def test_every_script_is_here_and_in_the_readme():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*TINY, *SHARED}
    told = (FOLDER / "README.md").read_text()
    commands = re.findall(r"^python examples/(\w+)\.py(.*)$", told, re.MULTILINE)
    assert {name for name, _ in commands} == {*TINY}
    for name, arguments in commands:
        importlib.import_module(name).options(shlex.split(arguments, comments=True))


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_of_a_plain_loop(name, capsys):
    importlib.import_module(name).check()
    assert torch.get_default_dtype() == torch.float32
    assert "as by a plain torch loop" in capsys.readouterr().out


@pytest.mark.parametrize("name", TINY)
def test_a_script_runs_through(name, tmp_path, capsys):
    arguments = TINY[name].format(data=written(tmp_path) if "data" in TINY[name] else "")
    module = importlib.import_module(name)
    module.main(module.options([*arguments.split(), "--out", str(tmp_path / "out")]))
    shown = capsys.readouterr().out
    assert re.search(r"\d", shown)
    for picture in re.findall(r"^picture: (.*)$", shown, re.MULTILINE):
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert ("picture:" in shown) == (name != "test_time_training")


def test_a_wrong_gradient_is_found():
    hold_to = importlib.import_module("common").hold_to
    right = torch.ones(3, dtype=torch.float64)
    hold_to([right], [right * (1 + 1e-13)], "these")
    with pytest.raises(AssertionError, match="not close"):
        hold_to([right], [right * (1 + 1e-7)], "these")
    for truth, found in ((right.float(), right), (0 * right, right), (None, right), (right, None)):
        with pytest.raises(AssertionError):
            hold_to([truth], [found], "these")


def test_fashion_mnist_is_read_as_it_is_written(tmp_path):
    read = importlib.import_module("fashion_mnist").read
    written(tmp_path, 30)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    x, y = read(tmp_path, "train")
    assert (x.shape, x.dtype, y.dtype) == ((30, 784), torch.float32, torch.int64)
    assert torch.equal(y, torch.arange(30) % 10)
    assert list((x * 255).round().to(torch.uint8).flatten().numpy().tobytes()) == list(
        gzip.decompress(file.read_bytes())[16:]
    )
    assert len(read(tmp_path, "test")[0]) == 20


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "apt install dataset-fashion-mnist"),
        (b"no gzip", "damaged: Not a gzipped file"),
        (gzip.compress(idx(torch.zeros(30, 28, 28)))[:60], "is damaged"),
        (gzip.compress(b""), "no IDX file of bytes with 3 dimensions"),
        (gzip.compress(idx(torch.zeros(30))), "no IDX file of bytes with 3 dimensions"),
        (gzip.compress(b"\0\0\x0d" + idx(torch.zeros(30, 28, 28))[3:]), "no IDX file of bytes"),
        (gzip.compress(idx(torch.zeros(30, 28, 28))[:-1]), r"holds 23519 bytes, and \[30, 28, 28\]"),
        (gzip.compress(idx(torch.zeros(29, 28, 28))), "30 labels"),
        (gzip.compress(idx(torch.zeros(30, 28, 27))), r"\[30, 28, 27\]"),
    ],
    ids=["missing", "plain", "cut", "empty", "labels", "floats", "short", "fewer", "narrow"],
)
def test_bad_files_are_refused_in_words(content, text, tmp_path):
    read = importlib.import_module("fashion_mnist").read
    file = written(tmp_path, 30) / "train-images-idx3-ubyte.gz"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=text):
        read(tmp_path, "train")


def test_bad_labels_are_refused_in_words(tmp_path):
    written(tmp_path, 30)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.full((30,), 10))))
    with pytest.raises(ValueError, match=r"label 10; they are 0\.\.9"):
        importlib.import_module("fashion_mnist").read(tmp_path, "train")
