"""Runs a process with a time limit. It is interrupted before its time is up, so that it can write what it knows, and
then killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds of the limit, at most half of it, that a process has after the interrupt
_LOOK = 0.1  # seconds between two looks at the process
_END = 1500  # characters of the output's end that are returned


def run(
    command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str], folder: Path,
    look: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Runs ``command`` in ``folder`` for at most ``limit`` seconds and calls ``look`` meanwhile.

    Its output is appended to ``log``. Whatever is raised here, the process and all that it started are gone afterwards.

    Returns its ``state`` (passed, failed, cut off), ``seconds``, and the ``end`` of its output.
    """
    began, grace = time.monotonic(), min(GRACE, limit / 2)
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            list(command), cwd=folder, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment}, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        state = "cut off"
        try:
            if _wait(process, began + limit - grace, look):
                state = "passed" if process.returncode == 0 else "failed"
            else:
                process.send_signal(signal.SIGINT)
                _wait(process, began + limit, look)
        except BaseException:  # the run is stopped, but the process may still write what it knows
            process.send_signal(signal.SIGINT)
            _wait(process, time.monotonic() + grace, lambda: None)
            raise
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            look()
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _END))
        end = file.read().decode(errors="replace")
    return {"state": state, "seconds": round(time.monotonic() - began, 1), "end": end}


def _wait(process: subprocess.Popen[bytes], until: float, look: Callable[[], None]) -> bool:
    """Waits for the process until the moment ``until``. Tells whether it has ended."""
    while process.poll() is None:
        if time.monotonic() >= until:
            return False
        look()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK)
    return True
