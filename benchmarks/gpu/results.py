"""The one file of numbers: a JSON line each, written the moment the number exists, by whichever process has it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILE, _BEGAN, _STEP = "GPU_CHECK_RESULTS", "GPU_CHECK_BEGAN", "GPU_CHECK_STEP"
_LONGEST, _LINE = 90, 200  # characters of a value and of a line that are printed; the file has all of them


class Results:
    """Appends to ``file``. ``began``: the time of day at which the run began. ``step``: whose numbers these are."""

    def __init__(self, file: Path, began: float, step: str) -> None:
        self.file, self.began, self.step = file, began, step

    @classmethod
    def of_this_process(cls) -> Results:
        """Those that the process was started with."""
        return cls(Path(os.environ[_FILE]), float(os.environ[_BEGAN]), os.environ[_STEP])

    def environment(self) -> dict[str, str]:
        """What a process needs for ``of_this_process``."""
        return {_FILE: str(self.file), _BEGAN: repr(self.began), _STEP: self.step}

    def add(self, of: str, **values: Any) -> None:
        """One line: ``values`` of the workload, file or tool ``of``."""
        line = {"elapsed": round(time.time() - self.began, 1), "step": self.step, "of": of, **_plain(values)}
        with self.file.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """As JSON takes it: what is not finite becomes ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def read(file: Path) -> list[dict[str, Any]]:
    """All whole lines; a process that was killed may have left half of one."""
    found = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def told(line: Mapping[str, Any]) -> str:
    """The line for people: ``[ 12.3 s] smoke:blocks sin25-5: gradient_error 1.2e-07, same_bits True``."""
    values = ", ".join(f"{key} {_short(value)}" for key, value in line.items() if key not in ("elapsed", "step", "of"))
    return _cut(f"[{line['elapsed']:6.1f} s] {line['step']} {line['of']}: {values}", _LINE)


def _short(value: Any) -> str:
    return _cut(f"{value:.3g}" if isinstance(value, float) else str(value), _LONGEST)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
