"""From a recipe to its model, learner and outer optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metafast import learners
from metafast.episodes import sources
from metafast.models import conv4, mlp
from metafast.training.recipes import Recipe

MetaLearner = learners.MAML | learners.Reptile


def choose_device(name: str) -> str:
    """``auto`` becomes ``cuda`` where there is one, else ``cpu``; anything else is taken at its word.

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
    """The recipe's network with initial values from ``seed``."""
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


def build_learner(recipe: Recipe, model: nn.Module, backend: str) -> MetaLearner:
    """The recipe's algorithm around ``model``. But for Reptile, no inner step moves batch norm's parameters."""
    inner: dict[str, Any] = {
        "loss": recipe.loss, "lr": recipe.inner_lr, "steps": recipe.steps, "backend": backend,
    }  # fmt: skip
    if recipe.algorithm == "reptile":
        return learners.Reptile(model, optimizer=recipe.inner_optimizer, **inner)
    if recipe.algorithm == "anil":
        return learners.ANIL(model, head="head", **inner)
    settings_of_maml = {
        "maml": learners.MAML,
        "fomaml": learners.FOMAML,
        "metasgd": learners.MetaSGD,
        "maml++": learners.MAMLPlusPlus,
    }
    return settings_of_maml[recipe.algorithm](model, adapt=learners.without_batch_norm(model), **inner)


def build_optimizer(recipe: Recipe, learner: nn.Module) -> torch.optim.Optimizer:
    """Adam, as in the papers; plain SGD for Reptile, whose meta-gradient is the way to go itself.

    Its ``lr`` is a tensor beside the parameters, and a step reads nothing back: a CUDA graph can hold it.
    """
    parameters = list(learner.parameters())
    on_gpu = parameters[0].is_cuda
    # The kernels read a rate on a GPU as float32, and one on the CPU as float64.
    lr = torch.tensor(recipe.lr, dtype=torch.float32 if on_gpu else torch.float64, device=parameters[0].device)
    if recipe.algorithm == "reptile":
        return torch.optim.SGD(parameters, lr=lr, fused=True)
    return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=on_gpu)
