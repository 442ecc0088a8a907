"""Keeps the record of a run in ``metrics.jsonl``, one JSON object a line, and in TensorBoard when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from metafast.extras import require
from metafast.files import write_atomically

FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads the lines of a run's record; a last line that was cut off by a crash is left out.

    Raises:
        ValueError: a line is damaged; the text names it.
    """
    path = folder / FILE
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            found = json.loads(line)
            lines.append({"iteration": found["iteration"], "kind": found["kind"], **found})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error!r}); take that line away") from error
    return lines


class Metrics:
    """Appends to the record of a run, after dropping what lies beyond the iteration that it starts from."""

    def __init__(self, folder: Path, start: int, tensorboard: bool) -> None:
        kept = [line for line in read_metrics(folder) if line["iteration"] <= start]
        write_atomically(folder / FILE, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._writer = None
        if tensorboard:
            module = require("torch.utils.tensorboard", "tensorboard")
            self._writer = module.SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        self._file = (folder / FILE).open("a")

    def write(self, iteration: int, kind: str, **values: float) -> None:
        """Adds one line; ``kind`` is ``train`` or ``validation``."""
        self._file.write(json.dumps({"iteration": iteration, "kind": kind, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, iteration)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
