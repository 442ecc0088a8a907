"""Writes the three files that a run leaves, however it ends.

``gpu_check.jsonl`` gets a line with each result. ``gpu_check.json`` is the report: after every step it has all results
with the machine, the steps and the bars. ``logs.tar.gz`` comes last. Everything else goes into a scratch folder.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .bars import judge
from .clock import Clock
from .results import Results, as_text, read

FORMAT = 1
NUMBERS, REPORT, LOGS = "gpu_check.jsonl", "gpu_check.json", "logs.tar.gz"
LARGEST = 400_000  # of a longer log so many bytes are kept, half from its beginning and half from its end
ALL = 10_000_000  # the archive's files have at most so many bytes before compression


class Report:
    """Writes the files of one plan into the folder ``out``. ``close`` removes the folder ``scratch`` and keeps
    ``logs``."""

    def __init__(self, out: Path, plan: str, clock: Clock, rehearsal: bool = False) -> None:
        self.out, self.clock = out, clock
        out.mkdir(parents=True, exist_ok=True)
        for name in (NUMBERS, REPORT, LOGS):
            (out / name).unlink(missing_ok=True)
        (out / NUMBERS).touch()
        self.scratch = Path(tempfile.mkdtemp(prefix="metafast-gpu-check-"))
        self.logs = self.scratch / "logs"
        self.logs.mkdir()
        date = datetime.now(timezone.utc).isoformat(timespec="minutes")
        self.content: dict[str, Any] = {
            "format": FORMAT, "plan": plan, "rehearsal": rehearsal, "date": date,
            "machine": {}, "steps": {}, "end": "running",
        }  # fmt: skip
        self._shown = 0
        self.write()

    def results(self, step: str) -> Results:
        """Returns the object that takes the results of ``step``."""
        return Results(self.out / NUMBERS, time.time() - self.clock.elapsed(), step)

    def show(self) -> None:
        """Prints the results that were added since the last call."""
        lines = read(self.out / NUMBERS)
        for line in lines[self._shown :]:
            _print(as_text(line))
        self._shown = len(lines)

    def say(self, text: str) -> None:
        """Prints one line with the time."""
        self.show()
        _print(f"[{self.clock.elapsed():6.1f} s] {text}")

    def step(self, name: str, found: dict[str, Any]) -> None:
        """Adds what a step has found, and writes the report."""
        self.content["steps"][name] = found
        why = "" if found["state"] == "passed" else f"; {_last(found)}"
        self.say(f"{name}: {found['state']} after {found['seconds']:.0f} s{why}")
        self.write()

    def write(self) -> None:
        """Writes the report as it stands. A reader sees the old one or the new one, never half of one."""
        content = {**self.content, "elapsed": round(self.clock.elapsed(), 1), "results": read(self.out / NUMBERS)}
        content["bars"] = judge([] if self.content["rehearsal"] else content["results"])
        file = self.scratch / REPORT
        file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        shutil.copy(file, self.out / f"{REPORT}.new")
        (self.out / f"{REPORT}.new").replace(self.out / REPORT)

    def close(self, end: str) -> None:
        """Writes everything, removes the scratch folder and prints the bars. ``end`` says how the run ended."""
        self.content["end"] = end
        self.write()
        pack_logs(self.logs, self.out / LOGS)
        shutil.rmtree(self.scratch, ignore_errors=True)
        for bar in json.loads((self.out / REPORT).read_text())["bars"]:
            _print(f"{bar['verdict']:>12}  {bar['text']}{bar['found'] and ': '}{bar['found']}")
        self.say(f"{end}; {self.out / REPORT}, {NUMBERS}, {LOGS}")


def _print(text: str) -> None:
    """Prints a line. If nobody reads the output any more, the run goes on."""
    with suppress(OSError):
        print(text, flush=True)


def _last(found: dict[str, Any]) -> str:
    """Returns the last words of a step that did not pass."""
    lines = [line.strip() for line in str(found.get("end", "")).splitlines() if line.strip()]
    return " / ".join(lines[-2:])[-300:]


def pack_logs(folder: Path, archive: Path) -> None:
    """Packs the files under ``folder``, the small ones first. A long file loses its middle; after ``ALL`` bytes the
    rest is left out."""
    total = 0
    with tarfile.open(archive, "w:gz") as tar:
        for file in sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: (f.stat().st_size, f)):
            content = file.read_bytes()
            if len(content) > LARGEST:
                cut = f"\n... {len(content) - LARGEST} bytes are left out ...\n".encode()
                content = content[: LARGEST // 2] + cut + content[-LARGEST // 2 :]
            total += len(content)
            if total > ALL:
                break
            entry = tarfile.TarInfo(f"logs/{file.relative_to(folder)}")
            entry.size, entry.mtime = len(content), int(file.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
