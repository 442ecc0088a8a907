import json

import pytest
import torch
from torch import nn

import metafast
from metafast import learners
from metafast.models import conv4, mlp
from metafast.training.build import build_learner, build_model, choose_device
from metafast.training.recipes import RECIPES, Recipe, recipe

GRADIENT = [name for name in learners.names() if issubclass(learners.by_name(name), metafast.GradientLearner)]


def test_every_recipe_survives_json():
    for chosen in RECIPES.values():
        assert Recipe.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen


def test_omniglot_recipes_have_the_settings_that_they_name():
    for ways, network, rate in ((5, "conv4-pool", 0.5), (20, "conv4-stride", 20 * 0.1)):
        for shots in (1, 5):
            chosen = recipe(f"omniglot-{ways}w{shots}s")
            assert (chosen.network, chosen.inner_lr) == (network, pytest.approx(rate))
            assert (chosen.ways, chosen.shots, chosen.queries, chosen.test_queries) == (ways, shots, shots, shots)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("algorithm", GRADIENT)
def test_every_gradient_based_algorithm_builds_for_every_recipe(name, algorithm):
    chosen = recipe(name, algorithm, channels=4)
    learner = build_learner(chosen, build_model(chosen, seed=0), "auto")
    assert type(learner) is learners.by_name(algorithm)
    assert len(learner.outer_optimizer(chosen.lr).param_groups[0]["params"]) == len(list(learner.parameters()))
    if algorithm == "anil":
        assert learner.adapted_names == {"head.weight", "head.bias"}
    elif algorithm != "reptile":
        names = {name for name, _ in learner.model.named_parameters()}
        assert learner.adapted_names == {name for name in names if not name.startswith("norm")}


def test_overrides_replace_fields_and_none_does_not():
    chosen = recipe("omniglot-5w1s", "fomaml", iterations=7, shots=3, lr=None)
    assert (chosen.algorithm, chosen.iterations, chosen.lr) == ("fomaml", 7, 2e-3)
    assert (chosen.shots, chosen.test_shots) == (3, (3,))


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("omniglot", {}, "there is no recipe 'omniglot'; choose from sinusoid"),
        ("sinusoid", {"algorithm": "mamlpp"}, "there is no algorithm 'mamlpp'; choose from "),
        ("sinusoid", {"tasks": 0}, "tasks is 0; it must be at least 1"),
        ("sinusoid", {"iterations": -5}, "iterations is -5"),
        ("sinusoid", {"inner_lr": float("nan")}, "inner_lr is nan; it must be a positive number"),
        ("sinusoid", {"lr": -1.0}, "lr is -1.0"),
        ("sinusoid", {"test_steps": ()}, r"test_steps is \(\)"),
        ("sinusoid", {"schedule": "step"}, "schedule is 'step'; it must be one of constant"),
        ("glyphs-5w1s", {"ways": 1}, "ways is 1; a classification task needs at least 2"),
        ("glyphs-5w1s", {"eval_every": -1}, "eval_every is -1"),
    ],
)
def test_bad_settings_are_named(name, overrides, text):
    with pytest.raises(ValueError, match=text):
        recipe(name, **overrides)


def test_a_recipe_of_another_version_is_refused():
    value = recipe("sinusoid").to_json() | {"momentum": 0.9}
    with pytest.raises(ValueError, match="momentum unknown or missing"):
        Recipe.from_json(value)


def test_schedules():
    linear = recipe("glyphs-5w1s", "reptile", iterations=10)
    assert [linear.lr_at(i) for i in (0, 5)] == [1.0, 0.5]
    cosine = recipe("glyphs-5w1s", "maml++", iterations=10)
    assert cosine.lr_at(0) == pytest.approx(1e-3)
    assert cosine.lr_at(5) == pytest.approx((1e-3 + 1e-5) / 2)
    assert recipe("sinusoid").lr_at(69_999) == 1e-3


def test_mlp_has_the_papers_shape_and_start():
    model = mlp(seed=3)
    assert [tuple(p.shape) for p in model.parameters()] == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]
    weights = torch.cat([m.weight.detach().flatten() for m in model if isinstance(m, nn.Linear)])
    assert float(weights.abs().max()) <= 0.02
    assert 0.0075 < float(weights.std()) < 0.0100  # a normal of 0.01 cut at two deviations has 0.0088
    assert all(not m.bias.any() for m in model if isinstance(m, nn.Linear))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mlp(seed=3).parameters(), strict=True))
    assert not torch.equal(model.hidden2.weight, mlp(seed=4).hidden2.weight)


@pytest.mark.parametrize(("pool", "features"), [(False, 64), (True, 64)])
def test_conv4_on_omniglot(pool, features):
    model = conv4(5, pool=pool)
    assert model.head.weight.shape == (5, features)
    assert model(torch.rand(10, 1, 28, 28)).shape == (10, 5)
    sizes = [tuple(y.shape[2:]) for y in _activations(model, nn.ReLU, torch.rand(2, 1, 28, 28))]
    assert sizes == ([(28, 28), (14, 14), (7, 7), (3, 3)] if pool else [(14, 14), (7, 7), (4, 4), (2, 2)])


def test_conv4_on_colour_pictures_has_800_features():
    assert conv4(5, channels=32, image=(3, 84, 84), pool=True).head.in_features == 800


def test_conv4_refuses_an_image_that_pooling_would_swallow():
    with pytest.raises(ValueError, match="4 poolings halve a 8x8 image below one pixel; it must be at least 16"):
        conv4(5, image=(1, 8, 8), pool=True)


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(ValueError, match=f"--device is '{name}'"):
        choose_device(name)


def _activations(model, kind, x):
    found = []
    hooks = [m.register_forward_hook(lambda *a: found.append(a[2])) for m in model if isinstance(m, kind)]
    model(x)
    for hook in hooks:
        hook.remove()
    return found
