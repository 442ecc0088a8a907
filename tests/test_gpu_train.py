"""What only a GPU can show of training: outer steps as CUDA graphs, checkpoints that change the device."""

from __future__ import annotations

import pytest
import torch
from test_outer import RECIPES, outer_step, state

from metafast.episodes import ClassificationSampler, ImageDataset
from metafast.training.outer_step import graph_obstacle, record_graph
from metafast.training.progress import Progress
from metafast.training.recipes import recipe
from metafast.training.run import Options, Training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def check_same_bits(plain, recorded, iterations):
    assert graph_obstacle(recorded.learner, recorded.sampler.batch(0)) is None
    for iteration in range(iterations):
        plain(iteration)
        recorded(iteration)
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(recorded), strict=True))
    assert plain.window.isfinite().all()
    assert plain.window.count_nonzero(0)[0] == min(iterations, len(plain.window))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("chosen", RECIPES.values(), ids=RECIPES)
def test_a_recorded_step_gives_the_same_bits(chosen, backend):
    check_same_bits(*(outer_step(chosen, backend, recorder, "cuda") for recorder in (None, record_graph)), 40)


@pytest.mark.parametrize("algorithm", ["maml", "maml++"])
def test_a_recorded_step_classifies_to_the_same_bits(algorithm):
    chosen = recipe("glyphs-5w1s", algorithm, tasks=4, channels=16, steps=2, clip=0.01)
    pixels = torch.randint(256, (9, 4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sampler = ClassificationSampler(ImageDataset(pixels.cuda(), tuple("abcdefghi")), 5, 1, 1, 4)
    steps = [outer_step(chosen, "triton", recorder, "cuda", sampler) for recorder in (None, record_graph)]
    check_same_bits(*steps, 12)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_another_device(tmp_path, first, second, backend):
    def run(device, iterations, folder, **options):
        chosen = recipe("sinusoid", iterations=iterations, tasks=5)
        training = Training(chosen, Options(folder, device=device, backend=on[device], **options))
        training.run(Progress())
        return training

    on = {"cpu": "auto", "cuda": backend}
    run(first, 20, tmp_path / "moved")
    moved = run(second, 60, tmp_path / "moved", resume=True)
    straight = run(second, 60, tmp_path / "straight")
    assert moved.done == 60
    for a, b in zip(state(moved.outer), state(straight.outer), strict=True):
        assert a.device == b.device
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
