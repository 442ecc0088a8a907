"""The file of results: whichever process has a result appends it at once, as a line of JSON."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILE, _BEGAN, _STEP = "GPU_CHECK_RESULTS", "GPU_CHECK_BEGAN", "GPU_CHECK_STEP"
# A printed value and a printed line have at most so many characters; the file has all of them.
_LONGEST = 90
_LINE = 200


class Results:
    """Appends the results of ``step`` to ``file``. ``began`` is the time of day at which the run began, in seconds."""

    def __init__(self, file: Path, began: float, step: str) -> None:
        self.file, self.began, self.step = file, began, step

    @classmethod
    def of_this_process(cls) -> Results:
        """Returns the results of the step that has started this process."""
        return cls(Path(os.environ[_FILE]), float(os.environ[_BEGAN]), os.environ[_STEP])

    def environment(self) -> dict[str, str]:
        """Returns the environment variables that ``of_this_process`` reads."""
        return {_FILE: str(self.file), _BEGAN: repr(self.began), _STEP: self.step}

    def add(self, of: str, **values: Any) -> None:
        """Adds a line with ``values`` of the workload, file or tool ``of``."""
        line = {"elapsed": round(time.time() - self.began, 1), "step": self.step, "of": of, **_json_values(values)}
        with self.file.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def _json_values(value: Any) -> Any:
    """Converts ``value`` to what JSON has; a number that is not finite becomes ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_values(inner) for key, inner in value.items()}
    return [_json_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def read(file: Path) -> list[dict[str, Any]]:
    """Reads all complete lines; a process that was killed may have left half of one."""
    found = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def as_text(line: Mapping[str, Any]) -> str:
    """Returns the line for people: ``[ 12.3 s] smoke:blocks sin25-5: gradient_error 1.2e-07, same_bits True``."""
    values = ", ".join(f"{key} {_short(value)}" for key, value in line.items() if key not in ("elapsed", "step", "of"))
    return _cut(f"[{line['elapsed']:6.1f} s] {line['step']} {line['of']}: {values}", _LINE)


def _short(value: Any) -> str:
    return _cut(f"{value:.3g}" if isinstance(value, float) else str(value), _LONGEST)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
