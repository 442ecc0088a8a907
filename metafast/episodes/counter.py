"""A counter-based source of random words: a pure function of where a draw stands, with no state to carry.

Every word is the SplitMix64 finaliser (Steele, Lea, Flood, OOPSLA 2014) chained over five coordinates:

    word(seed, stream, step, task, draw) = mix(mix(mix(mix(mix(seed) : stream) : step) : task) : draw),
    h : c = h + (c + 1) * golden   (mod 2^64)

in wrapping int64 arithmetic, which gives the same bits on every device. ``task`` is the index in the global
batch, so the words of a task do not depend on how many processes share the batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def _signed(value: int) -> int:
    """Returns the int64 that holds the same 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _mix_int(z: int) -> int:
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        z = ((z ^ (z >> shift)) * multiplier) % 2**64
    return z


def _mix(z: Tensor) -> Tensor:
    """Mixes in place; the mask makes torch's arithmetic right shift a logical one."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, None), strict=True):
        z ^= (z >> shift).bitwise_and_(2 ** (64 - shift) - 1)
        if multiplier is not None:
            z *= _signed(multiplier)
    return z


@dataclass(frozen=True)
class Counter:
    """Gives the random words of one (seed, stream).

    Args:
        seed: any integer; taken modulo 2^64.
        stream: a name; different names give unrelated words under the same seed.
    """

    seed: int
    stream: str

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed is {self.seed!r}; it must be an integer")
        if not isinstance(self.stream, str) or not self.stream:
            raise TypeError(f"stream is {self.stream!r}; it must be a name such as 'train' or 'test'")

    def words(self, step: int | Tensor, tasks: range, draws: int, device: torch.device) -> Tensor:
        """Returns random words, int64 ``[len(tasks), draws]``: row ``i``, column ``j`` is draw ``j`` of task
        ``tasks[i]``.

        ``step`` may be an int64 tensor on ``device``: then nothing waits for the host and the call can be
        captured in a CUDA graph. If it has an axis, the rows of its steps follow one another.
        """
        name = int.from_bytes(hashlib.sha256(self.stream.encode()).digest()[:8], "little")
        stream = _mix_int((_mix_int(self.seed % 2**64) + (name + 1) * _GOLDEN) % 2**64)
        if not isinstance(step, Tensor):
            step = torch.full((), _signed(step), dtype=torch.int64, device=device)
        h = _mix(step * _signed(_GOLDEN) + _signed(stream + _GOLDEN))
        task = torch.arange(tasks.start + 1, tasks.stop + 1, device=device)
        draw = torch.arange(1, draws + 1, device=device)
        h = _mix(h[..., None] + task * _signed(_GOLDEN))
        return _mix(h[..., None] + draw * _signed(_GOLDEN)).flatten(0, -2)

    def permutation(self, count: int) -> list[int]:
        """Returns ``0 .. count - 1`` in random order: sorted by the words of task 0 of step 0."""
        return self.words(0, range(1), count, torch.device("cpu"))[0].argsort().tolist()


def uniform(words: Tensor) -> Tensor:
    """Makes float64 in [0, 1) of the upper 53 bits of each word. This is exact, so every device gives the same bits."""
    return ((words >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53


def choose(words: Tensor, available: int | Tensor) -> Tensor:
    """Draws distinct numbers of ``0 .. available - 1``, one for each word of the last axis, in random order.

    These are the first k steps of a Fisher-Yates shuffle, without its array: step i swaps place i with place
    ``t_i = i + word_i mod (available - i)``, and going back over the swaps finds what stood at ``t_j`` before
    step j. So the cost depends on k alone. ``available`` may be a tensor that broadcasts against ``words``.
    All ordered choices are equally likely, to within ``available / 2^63``.
    """
    k = words.shape[-1]
    place = torch.arange(k, device=words.device)
    target = place + (words & (2**63 - 1)) % (available - place)
    chosen = target.clone()
    for i in reversed(range(k - 1)):
        later = chosen[..., i + 1 :]
        later.masked_fill_(later == target[..., i : i + 1], i)
    return chosen


def local_tasks(tasks: int, step: int | Tensor, rank: int, world: int) -> range:
    """Returns the global task indices ``rank * T / world ... (rank + 1) * T / world`` that a process works on.

    Raises:
        ValueError: step is negative, rank is outside [0, world), or world does not divide T.
    """
    if isinstance(step, Tensor):
        if step.dim() > 1 or step.dtype != torch.int64:
            raise ValueError(
                f"step is a tensor of shape {tuple(step.shape)} and {step.dtype}; it must be int64, 0- or 1-dim"
            )
    elif step < 0:
        raise ValueError(f"step is {step}; steps count from 0")
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank is {rank} and world is {world}; they must satisfy 0 <= rank < world")
    if tasks % world:
        raise ValueError(
            f"a batch of {tasks} tasks cannot be shared equally by world={world} processes; "
            f"use a multiple of {world} tasks"
        )
    share = tasks // world
    return range(rank * share, (rank + 1) * share)


def check_positive(**values: int) -> None:
    """Raises ValueError for the first value that is not a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
