"""Carries Triton's compiled kernels from the machine that compiled them to one that has the GPU.

Triton looks for a kernel in its cache under a key of two parts: the key of Triton itself, and the rest (source,
signature, options, assembler, target, environment). The first part differs between the builds of one version for
different Pythons. So an archive keeps only the rest for each kernel, and ``unpack`` puts the kernels where the
installed Triton looks for them.

As a plugin of pytest (``-p``) this module prints at the end how many kernels were found, and which were compiled.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INDEX = "index.json"
BINARIES = (".json", ".cubin")  # Triton reads no other file of a kernel that it finds


@dataclass(frozen=True)
class Kernel:
    """A kernel in Triton's cache. ``rest`` is its key without that of Triton itself."""

    name: str
    rest: str

    def folder(self, triton: str) -> str:
        """Returns the folder of the cache in which a Triton with the key ``triton`` looks for it."""
        key = hashlib.sha256(f"{triton}-{self.rest}".encode()).digest()
        return base64.b32encode(key).decode().rstrip("=")


@dataclass
class Found:
    """Counts the kernels that a process asked for: ``taken`` were in Triton's cache, ``missed`` (by name) were
    compiled."""

    taken: int = 0
    missed: Counter[str] = field(default_factory=Counter)

    @property
    def compiled(self) -> int:
        """Returns how many kernels had to be compiled."""
        return self.missed.total()

    def __str__(self) -> str:
        which = "".join(f", {count} {name}" for name, count in sorted(self.missed.items()))
        return f"Triton: {self.taken} kernels found in the cache, {self.compiled} compiled{which}"


def triton_key() -> str:
    """Returns the key of the installed Triton, which is made from its own files."""
    try:
        from triton.runtime.cache import triton_key as key
    except ImportError:  # Triton 3.4
        from triton.compiler.compiler import triton_key as key
    return key()


def pack(archive: Path, cache: Path, kernels: Iterable[Kernel]) -> int:
    """Writes ``kernels`` from Triton's folder ``cache`` into ``archive``, compressed together. Returns their number.

    Raises:
        FileNotFoundError: one of them is not in the cache.
    """
    import triton

    key, index, files = triton_key(), [], []
    for number, kernel in enumerate(sorted(set(kernels), key=lambda k: (k.name, k.rest))):
        folder = cache / kernel.folder(key)
        index.append({"name": kernel.name, "rest": kernel.rest})
        for suffix in BINARIES:
            file = folder / (kernel.name[:150] + suffix)
            if not file.is_file():
                raise FileNotFoundError(f"{file} is not there: the cache lacks kernel {kernel.name}")
            files.append((f"{number}{suffix}", file.read_bytes()))
    files.sort(key=lambda entry: Path(entry[0]).suffix)  # similar files side by side compress better
    head = json.dumps({"triton": triton.__version__, "kernels": index}).encode()
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for name, content in [(INDEX, head), *files]:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return len(index)


def unpack(archive: Path, folder: Path) -> int:
    """Puts the kernels of ``archive`` into ``folder`` and returns their number.

    The installed Triton finds them if TRITON_CACHE_DIR names that folder.

    Raises:
        ValueError: they were compiled by another version of Triton.
    """
    import triton

    with tarfile.open(archive) as tar:
        files = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    index = json.loads(files[INDEX])
    if index["triton"] != triton.__version__:
        raise ValueError(f"{archive} is of Triton {index['triton']} and here is {triton.__version__}: pack it anew")
    key = triton_key()
    for number, entry in enumerate(index["kernels"]):
        kernel = Kernel(**entry)
        name, place = kernel.name[:150], folder.resolve() / kernel.folder(key)
        place.mkdir(parents=True, exist_ok=True)
        for suffix in BINARIES:
            (place / (name + suffix)).write_bytes(files[f"{number}{suffix}"])
        group = {name + suffix: str(place / (name + suffix)) for suffix in BINARIES}
        (place / f"__grp__{name}.json").write_text(json.dumps({"child_paths": group}))
    return len(index["kernels"])


@contextlib.contextmanager
def count_misses() -> Iterator[Found]:
    """Counts the kernels that this process finds in Triton's cache within the block, and those that it compiles."""
    from triton import knobs

    found, before = Found(), knobs.compilation.listener

    def listen(*, src: Any, cache_hit: bool, **others: Any) -> None:
        if cache_hit:
            found.taken += 1
        else:
            found.missed[src.name] += 1
        if before is not None:
            before(src=src, cache_hit=cache_hit, **others)

    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before


class _Plugin:
    """Adds up the counts of pytest-xdist's workers, or takes those of the one process."""

    def __init__(self) -> None:
        self.total, self.stack = Found(), contextlib.ExitStack()
        self.here = self.stack.enter_context(count_misses())

    def pytest_sessionfinish(self, session: Any) -> None:
        self.stack.close()
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["triton"] = [self.here.taken, dict(self.here.missed)]
        else:
            self._add(self.here.taken, self.here.missed)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(str(self.total))

    def _add(self, taken: int, missed: dict[str, int]) -> None:
        self.total.taken += taken
        self.total.missed.update(missed)


class _Distributed:
    """Has the one hook that exists only with pytest-xdist."""

    def __init__(self, plugin: _Plugin) -> None:
        self.plugin = plugin

    def pytest_testnodedown(self, node: Any) -> None:
        if "triton" in getattr(node, "workeroutput", {}):
            self.plugin._add(*node.workeroutput["triton"])


def pytest_configure(config: Any) -> None:
    """Registers the plugins."""
    plugin = _Plugin()
    config.pluginmanager.register(plugin)
    if config.pluginmanager.hasplugin("dsession") or config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Distributed(plugin))
