"""Random bits as a pure function of where they are needed: no generator, no state.

Element ``i`` of a value that draw ``number`` makes in inner step ``s`` for a task with the seed ``z`` is

    key  = mix(mix(z + (s + 1) G) + (number + 1) G)        bits = mix(key + (i + 1) G)

with the finaliser of SplitMix64 (Steele, Lea, Flood 2014) as ``mix`` and its ``G``. Every pass over the same step, on
any device, by any number of threads and with any other tasks beside it, so finds the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 1 << 64


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD >> 1 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def mix(x: Tensor) -> Tensor:
    """Each int64 of ``x`` to another one, which tells nothing of its neighbours'; products wrap around."""
    x = (x ^ shifted(x, 30)) * _FACTORS[0]
    x = (x ^ shifted(x, 27)) * _FACTORS[1]
    return x ^ shifted(x, 31)


def shifted(x: Tensor, places: int) -> Tensor:
    """``x`` shifted to the right as a word without sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def seeds_of(base: int, tasks: int, part: int, device: torch.device) -> Tensor:
    """Seeds ``[T]`` for part 0 or 1 of each task (its support or its query set), from the one number ``base``."""
    numbers = torch.arange(part + 1, 2 * tasks + part + 1, 2, device=device)
    return mix(numbers * _GAMMA + base)


def bits(seeds: Tensor, step: int, number: int, count: int) -> Tensor:
    """Random int64 ``[T, count]`` for the tasks with ``seeds [T]``."""
    key = mix(mix(seeds + _wrapped((step + 1) * _GAMMA)) + _wrapped((number + 1) * _GAMMA))
    elements = torch.arange(1, count + 1, device=seeds.device) * _GAMMA
    return mix(key[:, None] + elements)


def _wrapped(number: int) -> int:
    return _signed(number % _WORD)
