"""The layers: one folder a layer, with its equations in ``reference.py`` and its test inputs in ``cases.py``."""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType


def modules(file: str) -> list[ModuleType]:
    """The module ``file`` of every folder that has one, in the order of the folders' names."""
    folders = sorted(entry.name for entry in iter_modules(__path__) if entry.ispkg)
    names = [f"{__name__}.{folder}.{file}" for folder in folders]
    return [import_module(name) for name in names if find_spec(name) is not None]
