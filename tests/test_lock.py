"""One run's folder belongs to one process."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys

import pytest

from metafast.training import lock
from metafast.training.lock import FILE, FolderLock, InUse

HOLD = """
import sys, time
from pathlib import Path
from metafast.training import lock
if sys.argv[2] == "numbers":
    lock.fcntl = None
held = lock.FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["locks", "numbers", "unsupported"])
def way(request, monkeypatch):
    """Takes the lock as a system with locks does, as one without, and as a file system without."""
    if request.param == "numbers":
        monkeypatch.setattr(lock, "fcntl", None)
    if request.param == "unsupported":

        def unsupported(descriptor, operation):
            raise OSError(errno.EOPNOTSUPP, "no locks here")

        monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    return "locks" if request.param == "locks" else "numbers"


def holder(folder, way):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), way], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, way):
    with holder(tmp_path, way) as process:
        text = rf"^{re.escape(str(tmp_path))} is in use: process {process.pid} trains in it; wait until it ends, or gi"
        with pytest.raises(InUse, match=text):
            FolderLock(tmp_path)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / FILE).read_text().startswith(f"{process.pid} ")
    with FolderLock(tmp_path):
        assert (tmp_path / FILE).read_text().startswith(f"{os.getpid()} ")
    assert list(tmp_path.iterdir()) == []


def test_objects_of_one_process_share_the_lock(tmp_path, way):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path / "." / "")
    with first:
        pass
    assert (tmp_path / FILE).exists()
    del second
    assert list(tmp_path.iterdir()) == []


def test_a_holder_on_another_machine_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / FILE).write_text("17 elsewhere\n")
    with pytest.raises(InUse, match=r"process 17 on elsewhere trains in it; .*, or delete .*\.lock if that process"):
        FolderLock(tmp_path)


FORK = """
import os, runpy, sys
from pathlib import Path
lock = runpy.run_path(sys.argv[1])
held = lock["FolderLock"](Path(sys.argv[2]))
child = os.fork()
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert Path(sys.argv[2], lock["FILE"]).exists()
else:
    held._release()
    try:
        lock["FolderLock"](Path(sys.argv[2]))
        os._exit(1)
    except lock["InUse"]:
        os._exit(0)
"""


def test_a_forked_child_neither_has_nor_ends_the_lock_of_its_parent(tmp_path):
    subprocess.run([sys.executable, "-c", FORK, lock.__file__, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


CONTEND = """
import os, runpy, sys
from pathlib import Path
lock = runpy.run_path(sys.argv[1])
folder, marker = Path(sys.argv[2]), sys.argv[3]
taken = 0
for _ in range(3000):
    try:
        with lock["FolderLock"](folder):
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            os.unlink(marker)
            taken += 1
    except lock["InUse"]:
        pass
print(taken)
"""


def test_of_processes_that_come_and_go_one_at_a_time_holds_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    program = [sys.executable, "-c", CONTEND, lock.__file__, str(tmp_path / "run"), str(tmp_path / "marker")]
    started = [subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in started:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert int(out) > 0
    assert list((tmp_path / "run").iterdir()) == []
