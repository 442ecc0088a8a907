"""Hooks for gradients are refused whenever they come, also after the first batch and after others have gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import metafast as mf
from metafast.learners.module_snapshot import ModuleSnapshot


def unchanged(*seen):
    return None


KINDS = {
    "a parameter": lambda model: model[0].weight.register_hook(unchanged),
    "a parameter whose gradient is ready": lambda model: model[0].weight.register_post_accumulate_grad_hook(unchanged),
    "a module": lambda model: model[0].register_full_backward_hook(unchanged),
    "a module, before its backward": lambda model: model[0].register_full_backward_pre_hook(unchanged),
    "all modules": lambda model: torch_module.register_module_full_backward_hook(unchanged),
    "all modules, before theirs": lambda model: torch_module.register_module_full_backward_pre_hook(unchanged),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_for_a_gradient_is_refused_each_time_it_comes(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    learner = mf.MAML(model, loss="mse", lr=0.1, steps=1)
    tasks = mf.TaskBatch(*(torch.randn(3, 5, width) for width in (2, 1, 2, 1)))
    learner.backward(tasks)
    first = model[0].weight.grad.clone()
    for _ in range(2):
        learner.zero_grad()
        hook = KINDS[kind](model)
        try:
            with pytest.raises(mf.CaptureError, match="hook"):
                learner.backward(tasks)
        finally:
            hook.remove()
        learner.backward(tasks)
        assert torch.equal(model[0].weight.grad, first)


def test_a_hook_of_learned_rates_runs_and_costs_no_capture():
    """Their gradient goes through autograd."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    learner = mf.MetaSGD(model, loss="mse", lr=0.1, steps=1)
    tasks = mf.TaskBatch(*(torch.randn(3, 5, width) for width in (2, 1, 2, 1)))
    seen = []
    learner.rate.value.register_hook(lambda gradient: seen.append(gradient))
    learner.backward(tasks)
    captured = learner.program
    learner.backward(tasks)
    assert len(seen) == 2
    assert learner.program is captured


def test_code_of_installed_packages_is_not_searched(tmp_path, monkeypatch):
    """It is large and stays what it is; a look at all that it reads would cost more than a small batch."""
    package = tmp_path / "site-packages" / "package_of_others"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import torch\n\nscale = 2.0\n\n\ndef helper(x):\n    return x * scale\n\n\n"
        "class Layer(torch.nn.Module):\n    def forward(self, x):\n        return helper(x)\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    from package_of_others import Layer

    model = nn.Sequential(nn.Linear(2, 4), Layer(), nn.Linear(4, 1))
    learner = mf.MAML(model, loss="mse", lr=0.1, steps=1)
    learner.backward(mf.TaskBatch(*(torch.randn(3, 5, width) for width in (2, 1, 2, 1))))
    snapshot = ModuleSnapshot(model)
    assert (snapshot._globals, snapshot._functions, snapshot.changed()) == ([], [], False)
