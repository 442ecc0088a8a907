"""Builds a recipe's model and learner."""

from __future__ import annotations

import torch
from torch import nn

from metafast import learners
from metafast.episodes import sources
from metafast.learners import Learner
from metafast.models import conv4, mlp
from metafast.training.recipes import Recipe


def choose_device(name: str) -> str:
    """Makes ``cuda`` of ``auto`` where there is one, else ``cpu``; anything else is taken at its word.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}; give auto, cpu, cuda or cuda:INDEX") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; metafast runs on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device is {name!r} and torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "`metafast doctor` says why, --device cpu runs without one"
        )
    return name


def build_model(recipe: Recipe, seed: int) -> nn.Module:
    """Builds the recipe's network with initial values from ``seed``."""
    if recipe.network == "mlp":
        return mlp(hidden=(recipe.channels, recipe.channels), seed=seed)
    return conv4(
        recipe.ways,
        channels=recipe.channels,
        image=sources.find(recipe.data).sample,
        pool=recipe.network == "conv4-pool",
        head_std=recipe.head_std,
        seed=seed,
    )


def build_learner(recipe: Recipe, model: nn.Module, backend: str) -> Learner:
    """Builds the recipe's learner around ``model``."""
    return learners.by_name(recipe.algorithm).from_recipe(recipe, model, backend)
