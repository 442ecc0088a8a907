"""Holds what the examples share: their options, the comparison with a plain torch loop, and the picture at the end."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def options_of(doc: str | None, argv: list[str] | None = None, **defaults: Any) -> argparse.Namespace:
    """Reads the options of a script: ``--check``, ``--out``, ``--seed``, and those that have ``defaults``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with a plain torch loop in float64, and stop")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder for the picture (%(default)s)")
    for name, value in {"seed": 0, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="%(default)s")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    return options


@contextmanager
def in_float64() -> Iterator[None]:
    """Makes float64 the dtype of new tensors, for as long as the context lasts."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def hold_to(truth: Iterable[Tensor | None], found: Iterable[Tensor | None], what: str) -> None:
    """Compares gradients with those of a plain loop, and says how far apart they are at most.

    Raises:
        AssertionError: they differ by more than rounding in float64.
    """
    worst = 0.0
    for of_loop, of_metafast in zip(truth, found, strict=True):
        assert of_loop is not None, "the plain loop has no gradient"
        assert of_loop.dtype == torch.float64, "the comparison is of float64"
        assert of_loop.abs().max() > 0, "the gradient is zero"
        assert of_metafast is not None, "metafast has no gradient"
        torch.testing.assert_close(of_metafast, of_loop, rtol=1e-9, atol=1e-9 * float(of_loop.abs().max()))
        worst = max(worst, float((of_metafast - of_loop).abs().max() / of_loop.abs().max()))
    print(f"{what}: as by a plain torch loop, to {worst:.0e}")


def save(figure: Any, folder: Path, name: str) -> None:
    """Writes a picture into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, dpi=120)
    print(f"picture: {folder / name}")
