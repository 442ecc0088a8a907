"""The files that a run leaves, whatever becomes of it: numbers, the report, one archive of logs.

``gpu_check.jsonl`` grows by a line a number; ``gpu_check.json``, after every step, has all of them with the machine,
the steps and the bars; ``logs.tar.gz`` comes last. All other work happens in a scratch folder.
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
from .results import Results, read, told

FORMAT = 1
NUMBERS, REPORT, LOGS = "gpu_check.jsonl", "gpu_check.json", "logs.tar.gz"
LARGEST = 400_000  # bytes of a log that are kept, half from its beginning and half from its end
ALL = 10_000_000  # bytes of the archive's files before compression


class Report:
    """Of one plan, in the folder ``out``. ``scratch`` is gone after ``close``; what lies in ``logs`` is kept."""

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
        """Where the numbers of ``step`` go."""
        return Results(self.out / NUMBERS, time.time() - self.clock.elapsed(), step)

    def show(self) -> None:
        """Prints what has been appended since it was last called."""
        lines = read(self.out / NUMBERS)
        for line in lines[self._shown :]:
            _print(told(line))
        self._shown = len(lines)

    def say(self, text: str) -> None:
        """One line with the time."""
        self.show()
        _print(f"[{self.clock.elapsed():6.1f} s] {text}")

    def step(self, name: str, found: dict[str, Any]) -> None:
        """What became of a step."""
        self.content["steps"][name] = found
        why = "" if found["state"] == "passed" else f"; {_last(found)}"
        self.say(f"{name}: {found['state']} after {found['seconds']:.0f} s{why}")
        self.write()

    def write(self) -> None:
        """The report as it stands. A reader sees the old one or the new one, never half."""
        content = {**self.content, "elapsed": round(self.clock.elapsed(), 1), "results": read(self.out / NUMBERS)}
        content["bars"] = judge([] if self.content["rehearsal"] else content["results"])
        file = self.scratch / REPORT
        file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        shutil.copy(file, self.out / f"{REPORT}.new")
        (self.out / f"{REPORT}.new").replace(self.out / REPORT)

    def close(self, end: str) -> None:
        """``end``: how the run ended. Writes everything, removes the scratch folder and prints the bars."""
        self.content["end"] = end
        self.write()
        pack_logs(self.logs, self.out / LOGS)
        shutil.rmtree(self.scratch, ignore_errors=True)
        for bar in json.loads((self.out / REPORT).read_text())["bars"]:
            _print(f"{bar['verdict']:>12}  {bar['text']}{bar['found'] and ': '}{bar['found']}")
        self.say(f"{end}; {self.out / REPORT}, {NUMBERS}, {LOGS}")


def _print(text: str) -> None:
    """A line for whoever looks on; that nobody does any more is no reason to stop."""
    with suppress(OSError):
        print(text, flush=True)


def _last(found: dict[str, Any]) -> str:
    """The last words of a step that did not pass."""
    lines = [line.strip() for line in str(found.get("end", "")).splitlines() if line.strip()]
    return " / ".join(lines[-2:])[-300:]


def pack_logs(folder: Path, archive: Path) -> None:
    """All files under ``folder``, the small ones first: long ones lose their middle, and past ``ALL`` bytes none is
    added."""
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
