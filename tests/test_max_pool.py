"""Max pooling whose windows lie on the padding alone, of which torch makes -inf, is refused in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import metafast as mf


def learner_of(pool, backend):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), pool, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    return mf.MAML(model, loss="cross_entropy", lr=0.1, backend=backend)


def tasks():
    x, y = torch.randn(2, 4, 1, 3, 5), torch.randint(0, 3, (2, 4))
    return mf.TaskBatch(x, y, x, y)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("ceil", [False, True])
def test_a_window_of_padding_alone(backend, ceil):
    pool = nn.MaxPool2d(2, 1, padding=1, dilation=(4, 1), ceil_mode=ceil)
    assert pool(torch.zeros(1, 1, 3, 5)).isinf().all()
    with pytest.raises(ValueError, match=r"'1' \(max_pool2d\).* padding alone.* image has 3;.* smaller dilation"):
        learner_of(pool, backend).backward(tasks())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(2, 1, 1, (3, 2)), nn.MaxPool2d(3, 2, 1, 2), nn.MaxPool2d(2, 1, 0, 2)])
def test_windows_that_reach_the_image_are_run(pool, backend):
    assert learner_of(pool, backend).backward(tasks()).losses.isfinite().all()
