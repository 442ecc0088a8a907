"""Measures workloads: it checks every peer against the oracle first, then times the peers in turns, A B C A B C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from metafast.bench import oracles
from metafast.bench.peers import Metafast, Peer, TorchLoop
from metafast.bench.worker import CutOff, Failed, Worker
from metafast.bench.workloads import Workload
from metafast.executors import check_backend
from metafast.machine import bare_bytes, describe, rates
from metafast.program.capture import capture
from metafast.program.flops import meta_cost
from metafast.program.losses import as_loss
from metafast.verification.agreement import EXACT, GRADIENT, LOSSES, PARAMETER, Answer, agreement

FORMAT = 1
_FEWEST_CALLS = 3  # with fewer, quartiles mean nothing
# Layers that do not amplify rounding errors; convolutions, batch norms and pooling do.
_NOT_AMPLIFYING = (
    nn.Sequential, nn.Linear, nn.LayerNorm, nn.Flatten, nn.Identity,
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.Tanh,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How to measure; all times are in seconds.

    Args:
        device: ``"cpu"`` or a CUDA device.
        threads: the threads of each process; ``None`` leaves the choice to torch.
        rounds: the turns of each peer.
        turn: how long a peer's turn lasts.
        budget: how long all turns of a peer last together; every peer gets at least three calls.
        limit: the limit of one call; a peer that needs longer is cut off.
        first_limit: the limit of the first call, which may compile.
        side_by_side: whether the first calls of all peers run at the same time. This saves time on a machine with many
            cores, but the times of the first calls mean less.
        oracle: the folder of float64 oracles, one file for each workload; ``None``: they are computed.

    Raises:
        ValueError: one of the numbers is not positive.
    """

    device: str = "cpu"
    threads: int | None = None
    rounds: int = 10
    turn: float = 0.2
    budget: float = 6.0
    limit: float = 30.0
    first_limit: float = 120.0
    side_by_side: bool = False
    oracle: Path | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        for name in ("turn", "budget", "limit", "first_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name):g}: give seconds, more than 0")


class Stopped(Exception):
    """The run ended early. ``reason`` is Ctrl-C or the error of a workload; ``result`` has what was measured before."""

    def __init__(self, result: dict[str, Any], reason: BaseException) -> None:
        self.result, self.reason = result, reason


@dataclass
class _Contender:
    """A peer while a workload is measured. ``times`` are the seconds of its calls, ``row`` is what will be reported."""

    peer: Peer
    worker: Worker | None = None
    times: list[float] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.row = {"name": self.peer.name, "version": "", "state": "measured", "note": ""}

    @property
    def timed(self) -> bool:
        """Tells whether there are enough calls for quartiles."""
        return len(self.times) >= _FEWEST_CALLS

    def drop_out(self, state: str, note: str) -> None:
        """Ends its process, so that it takes no further part; ``state`` and ``note`` say why."""
        self.row.update(state=state, note=note)
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def measure(
    workloads: Sequence[Workload], peers: Sequence[Peer], settings: Settings, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures ``workloads`` and returns everything about them as JSON values. ``say`` receives lines of progress.

    Raises:
        FileNotFoundError, ValueError: the folder of oracles has no file for a workload, or one that does not fit it; or
            a workload's model cannot take its samples or labels. This shows before anything is measured.
        Stopped: Ctrl-C was pressed, or a workload has no oracle.
    """
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    costs = [_cost(workload) for workload in workloads]
    if settings.oracle is not None:
        for workload in workloads:
            _kept_oracle(settings.oracle, workload)
    tolerances = {"losses": LOSSES, "gradient": GRADIENT, "parameter": PARAMETER, "exact": EXACT}
    result: dict[str, Any] = {
        "format": FORMAT,
        "machine": describe(settings.device, threads),
        "settings": {**asdict(settings), "oracle": settings.oracle and str(settings.oracle)},
        "tolerances": {name: asdict(tolerance) for name, tolerance in tolerances.items()},
        "bare_torch_bytes": bare_bytes(),
        "workloads": [],
    }
    try:
        for workload, cost in zip(workloads, costs, strict=True):
            found, interrupted = _measure(workload, cost, peers, settings, result, say)
            result["workloads"].append(found)
            if interrupted:
                raise KeyboardInterrupt
    except (KeyboardInterrupt, RuntimeError) as error:
        raise Stopped(result, error) from error
    return result


def _cost(workload: Workload) -> dict[str, int]:
    """Counts FLOPs, bytes and parameters of the workload, and checks that its model fits its samples and labels."""
    tasks = workload.draw()
    model, support = workload.network().to(tasks.query_x), tasks.support.at(0)
    program = capture(model, as_loss(workload.loss), support.x[0], steps=workload.steps)
    with torch.no_grad():
        output = tuple(model(support.x[0]).shape[1:])
    program.loss.check(output, support.y, "support_y")
    return {**asdict(meta_cost(program, tasks, workload.loop)), "parameters": program.size}


def _measure(
    workload: Workload, cost: dict[str, int], peers: Sequence[Peer], settings: Settings, result: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """Returns the entry of ``workload`` in ``result``, and whether Ctrl-C ended it early."""
    threads, bare = result["machine"]["threads"], result["bare_torch_bytes"]
    machine = rates(settings.device)
    floors = {"flops": cost["flops"] / machine.matrix, "bytes": cost["least_bytes"] / machine.copy}
    say(f"{workload.name}: the oracle")
    oracle = _oracle(workload, settings, threads)
    contenders = [_Contender(peer) for peer in peers]
    interrupted = False
    try:
        _first_calls(contenders, workload, oracle, settings, threads, say)
        for turn in range(settings.rounds):
            for contender in contenders:
                say(f"{workload.name}: round {turn + 1} of {settings.rounds}, {contender.peer.name}")
                _turn(contender, settings, bare)
    except KeyboardInterrupt:
        interrupted = True
        if not any(contender.timed for contender in contenders):
            raise
        for contender in contenders:
            if contender.row["state"] == "measured" and not contender.timed:
                contender.drop_out("interrupted", f"Ctrl-C came before its call number {_FEWEST_CALLS}")
    finally:
        for contender in contenders:
            if contender.worker is not None:
                contender.worker.close()
    rows = [_finish(c, workload, cost, machine.matrix, machine.copy, max(floors.values())) for c in contenders]
    _compare(rows)
    keys = ("loss", "ways", "shots", "queries", "tasks", "steps", "lr", "each_step", "learns_lr")
    sizes = {key: getattr(workload, key) for key in keys}
    found = {
        "name": workload.name,
        "sizes": {**sizes, "sample": list(workload.sample), "inner": str(workload.inner)},
        "cost": cost,
        "rates": asdict(machine),
        "floors_s": floors,
        "rows": rows,
    }
    return found, interrupted


def _oracle(workload: Workload, settings: Settings, threads: int) -> Answer:
    if settings.oracle is not None:
        return _kept_oracle(settings.oracle, workload)
    worker = Worker(TorchLoop(), workload, settings.device, threads, torch.float64)
    try:
        losses, gradient = worker.first(10 * settings.first_limit)[1]
    except (CutOff, Failed) as error:
        reason = str(error) or f"it takes longer than {10 * settings.first_limit:g} s"
        raise RuntimeError(f"{workload.name}: there is no float64 oracle to check against: {reason}") from error
    finally:
        worker.close()
    if not all(np.isfinite(values).all() for values in (losses, *gradient.values())):
        raise RuntimeError(
            f"{workload.name}: losses or gradient are not finite in float64 either, so there is nothing to check "
            f"against; give a smaller rate than --lr {workload.lr:g}, or other initial values"
        )
    return losses, gradient


def _kept_oracle(folder: Path, workload: Workload) -> Answer:
    try:
        return oracles.load(folder, workload)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; make gpu-pack writes those of the canonical workloads, and without --oracle it is worked out"
        ) from error


def _first_calls(
    contenders: Sequence[_Contender], workload: Workload, oracle: Answer, settings: Settings, threads: int,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    if settings.side_by_side:
        say(f"{workload.name}: the first calls of all")
        for contender in contenders:
            _start(contender, workload, settings, threads)
    for contender in contenders:
        say(f"{workload.name}: {contender.peer.name}, first call")
        if not settings.side_by_side:
            _start(contender, workload, settings, threads)
        _check(contender, workload, oracle, settings)


def _start(contender: _Contender, workload: Workload, settings: Settings, threads: int) -> None:
    """Starts the contender's process and its first call."""
    missing = contender.peer.missing(workload, settings.device)
    if missing is not None:
        return contender.drop_out("missing", missing)
    contender.worker = Worker(contender.peer, workload, settings.device, threads)
    contender.worker.begin()
    return None


def _check(contender: _Contender, workload: Workload, oracle: Answer, settings: Settings) -> None:
    """Holds the answer of the first call against the oracle; a contender that disagrees is not timed."""
    if contender.worker is None:
        return None
    try:
        seconds, answer = contender.worker.first(settings.first_limit)
    except CutOff:
        return contender.drop_out("cut off", f"its first call takes longer than {settings.first_limit:g} s")
    except Failed as error:
        return contender.drop_out("failed", str(error))
    found = agreement(answer, oracle)
    contender.row.update(version=contender.worker.version, first_call_s=seconds, agreement=found.to_json())
    if not found.agrees:
        contender.drop_out("disagrees", str(found))
    elif exact_path(workload) and not found.exact:
        worst = max(found.losses, found.gradient)
        contender.row["flag"] = f"off by {worst:.1e} where float32 allows {EXACT.value:g}"
    return None


def exact_path(workload: Workload) -> bool:
    """Tells whether nothing in the network amplifies rounding errors."""
    return all(isinstance(module, _NOT_AMPLIFYING) for module in workload.network().modules())


def _turn(contender: _Contender, settings: Settings, bare: int) -> None:
    if contender.worker is None or (contender.timed and sum(contender.times) >= settings.budget):
        return
    try:
        times, peak = contender.worker.turn(settings.turn, settings.limit)
    except CutOff:
        contender.drop_out("cut off", f"one call takes longer than {settings.limit:g} s")
    except Failed as error:
        contender.drop_out("failed", str(error))
    else:
        contender.times += times
        contender.row["peak_bytes"] = peak.get("device", max(0, peak["host"] - bare))
        if "beyond_data" in peak:
            contender.row["beyond_data_bytes"] = peak["beyond_data"]


def _finish(
    contender: _Contender, workload: Workload, cost: dict[str, int], matrix: float, copy: float, floor: float
) -> dict[str, Any]:  # fmt: skip
    row = contender.row
    row["floor_s"] = floor
    if row["state"] != "measured":
        return row
    q1, median, q3 = (float(value) for value in np.quantile(contender.times, (0.25, 0.5, 0.75)))
    row.update(
        calls=len(contender.times),
        q1_s=q1,
        median_s=median,
        q3_s=q3,
        tasks_per_s=workload.tasks / median,
        over_floor=median / floor,
        matrix_share=cost["flops"] / median / matrix,
        copy_share=cost["least_bytes"] / median / copy,
    )
    return row


def _compare(rows: list[dict[str, Any]]) -> None:
    """Adds the speed-ups between all rows that were measured and not flagged, which all agree with the oracle."""
    measured = [row for row in rows if row["state"] == "measured" and "flag" not in row]
    for row in measured:
        others = (other for other in measured if other is not row)
        row["speedup_over"] = {other["name"]: other["median_s"] / row["median_s"] for other in others}


def contenders(backends: Sequence[str], chosen: Sequence[str], known: Sequence[Peer]) -> list[Peer]:
    """Returns metafast with each of ``backends``, then the peers among ``known`` whose names begin with a name in
    ``chosen``. An empty ``chosen`` takes all of them.

    Raises:
        ValueError: no peer's name begins so, or more than one does.
    """
    for backend in backends:
        check_backend(backend)
    wanted: dict[str, Peer] = {} if chosen else {peer.name: peer for peer in known}
    for name in chosen:
        found = [peer for peer in known if peer.name.lower().startswith(name.lower())]
        if len(found) != 1:
            raise ValueError(
                f"--peer {name!r} is unknown; choose from {', '.join(peer.name for peer in found or known)}"
            )
        wanted[found[0].name] = found[0]
    return [*(Metafast(backend) for backend in dict.fromkeys(backends)), *wanted.values()]
