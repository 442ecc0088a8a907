"""Numbers that are none go through the steps in C++ as they go through those in PyTorch."""

from __future__ import annotations

import pytest
import torch
from native_work import RULES, work

from metafast.executors import CpuExecutor, ReferenceExecutor

pytestmark = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")


@pytest.mark.parametrize("name", ["norm", "both clips", "adam, clips", "rmsprop, all"])
def test_what_is_no_number_stays_none(name):
    made = work(RULES[name], tasks=3)
    made.tasks.support_x[1, 2] = torch.nan
    given = made.program, made.loop, made.params, made.rates, made.tasks.support
    found, wanted = (executor.adapt(*given) for executor in (CpuExecutor(), ReferenceExecutor()))
    assert wanted[1, 1].isnan().any()
    assert not wanted[:, [0, 2]].isnan().any()
    assert torch.equal(found.isnan(), wanted.isnan())
