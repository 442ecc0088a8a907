"""Keeps two processes out of one run's folder. What a killed process held is free again."""

from __future__ import annotations

import errno
import os
import socket
import weakref
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows has no such locks; there the numbers of processes decide.
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
_Key = tuple[int, Path]
# The lock files that are held, by process and path: the open descriptor if it is what locks, and how many objects share
# it. A forked child finds nothing of its own here, so it neither shares what its parent holds nor lets it go.
_HELD: dict[_Key, tuple[int | None, int]] = {}


class InUse(RuntimeError):
    """Another process works in the folder; the text names both, and what to do."""


class FolderLock:
    """Holds a folder for this process until a ``with`` block of it ends, or the object or the process is gone.

    The objects of one process share the lock. It is the system's lock on a file, which ends with its process however
    that ends. On a file system without such locks the number of the process in that file counts, while it is alive.

    Raises:
        InUse: another process holds the folder.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        key = (os.getpid(), folder.resolve() / FILE)
        descriptor, holders = _HELD.get(key) or (_take(key[1]), 0)
        _HELD[key] = (descriptor, holders + 1)
        self._release = weakref.finalize(self, _let_go, key)

    def __enter__(self) -> None:
        """Has nothing to do: the folder is held already."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()


def _let_go(key: _Key) -> None:
    if key[0] != os.getpid():
        return
    descriptor, holders = _HELD.pop(key)
    if holders > 1:
        _HELD[key] = (descriptor, holders - 1)
        return
    # First the file goes, then the lock: whoever opened the file before finds that it is no longer there.
    key[1].unlink(missing_ok=True)
    if descriptor is not None:
        os.close(descriptor)


def _take(path: Path) -> int | None:
    """Writes the number of this process into the lock file. Returns its descriptor if that is what locks."""
    text = f"{os.getpid()} {socket.gethostname()}\n".encode()
    locked = _take_by_lock(path) if fcntl is not None else None
    if locked is not None:
        os.write(locked, text)
        return locked
    descriptor = _take_by_number(path)
    os.write(descriptor, text)
    os.close(descriptor)
    return None


def _take_by_lock(path: Path) -> int | None:
    """Locks the file; returns ``None`` where the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise _in_use(path, "") from None
            if path.stat().st_size == 0:
                path.unlink()
            return None
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its holder took it away between the opening and the lock


def _take_by_number(path: Path) -> int:
    """Creates the file, over that of a dead process of this machine."""
    for last in (False, True):
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            if last or _may_be_alive(*_holder(path)):
                raise _in_use(path, f", or delete {path} if that process is gone") from None
            path.unlink(missing_ok=True)
    raise AssertionError("the loop returns or raises")


def _holder(path: Path) -> tuple[int | None, str]:
    """Reads the number and the machine of the process that holds the file."""
    try:
        number, host = path.read_text().split()
        return int(number), host
    except (OSError, ValueError):  # just let go, or not written yet
        return None, ""


def _may_be_alive(number: int | None, host: str) -> bool:
    # A process of another machine cannot be asked. On Windows signal 0 would not ask but press Ctrl-C.
    if number is None or host != socket.gethostname() or os.name == "nt":
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _in_use(path: Path, remedy: str) -> InUse:
    number, host = _holder(path)
    who = "another process" if number is None else f"process {number}"
    where = "" if host in ("", socket.gethostname()) else f" on {host}"
    return InUse(
        f"{path.parent} is in use: {who}{where} trains in it; wait until it ends, or give another --out{remedy}"
    )
