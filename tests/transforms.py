"""Learners and models that torch's transforms are tried around."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from test_outside_gradients import LR, STEPS, data, labels, mlp
from torch import nn

import metafast as mf


class Cosine(nn.Module):
    """Has operations without rules of their own, and a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.body, self.unused, self.head = nn.Linear(4, 6), nn.Linear(2, 2), nn.Parameter(torch.randn(3, 6))
        self.double()

    def forward(self, x):
        return 3 * F.linear(F.normalize(torch.tanh(self.body(x)), dim=-1), F.normalize(self.head, dim=-1))


def make(model=None, tasks=None, **options):
    model = mlp() if model is None else model
    if tasks is None:
        (x, qx), (y, qy) = data(4), labels()
        tasks = mf.TaskBatch(x, y, qx, qy)
    settings = {"loss": "cross_entropy", "lr": LR, "steps": STEPS, **options}
    return model, mf.MAML(model, **settings), tasks


def close(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def left_behind(value, tensors):
    for tensor in tensors:
        tensor.grad = None
    value.backward()
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
