"""Runs small parts of PyTorch's work on one thread, where the number of threads would decide how they are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets PyTorch compute on the calling thread alone.

    PyTorch cuts large tensors into a piece for each thread. Sums to a single number, softmax and its like, and the ends
    of pieces that fill no vector (of sigmoid, cosh, powers, ...) are rounded otherwise wherever the cuts lie.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
