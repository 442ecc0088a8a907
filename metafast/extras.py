"""Imports optional packages where they are used, and says how to install one that is missing."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str = "train") -> Any:
    """Imports and returns ``module``, which installing ``metafast[extra]`` brings along.

    Raises:
        ModuleNotFoundError: it is not installed; the text has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f'this needs the package {package}, which is not installed: pip install "metafast[{extra}]"',
            name=package,
        ) from error
