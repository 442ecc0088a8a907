"""Writes what a run leaves behind: ``summary.json``, ``curves.png`` and, for known curves, ``adaptation.png``."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from metafast.episodes import sources
from metafast.extras import require
from metafast.files import write_json
from metafast.learners import Learner
from metafast.machine import VERSION
from metafast.training.data import Episodes
from metafast.training.evaluate import final_test, headline
from metafast.training.lock import FolderLock
from metafast.training.metrics import read_metrics
from metafast.training.recipes import Recipe
from metafast.training.run import Training

SUMMARY = "summary.json"


def finish(training: Training, test_tasks: int, wall_seconds: float) -> dict[str, Any]:
    """Tests what a run has learned and writes its summary and pictures. Returns the summary."""
    recipe, options, folder = training.recipe, training.options, training.options.out
    tested = training.load_tested()
    rows = final_test(training.learner, recipe, training.episodes, test_tasks)
    summary = {
        "recipe": recipe.name,
        "algorithm": recipe.algorithm,
        "metric": recipe.metric,
        "result": headline(rows),
        "tests": rows,
        "queries": f"{recipe.test_queries} a {'class' if recipe.classification else 'task'}",
        "batch_norm": training.learner.batch_norm(),
        "tested": tested,
        "training": {
            "iterations": training.done,
            "tasks_per_iteration": recipe.tasks,
            "seconds": round(training.seconds, 3),
            "tasks_per_s": round(training.done * recipe.tasks / max(training.seconds, 1e-9), 1),
        },
        "wall_seconds": round(wall_seconds, 3),
        "seed": options.seed,
        "settings": recipe.to_json(),
        "episodes": {
            "classes": dict(training.episodes.classes),
            "train": training.episodes.train.settings,
            "test": {str(shots): sampler.settings for shots, sampler in training.episodes.test.items()},
        },
        "executor": training.executor.splitlines(),
        "outer_step": training.launched,
        "device": device_name(training.device),
        "versions": versions(),
    }
    with FolderLock(folder):
        write_json(folder / SUMMARY, summary)
        draw_curves(read_metrics(folder), recipe, folder / "curves.png")
        if (curve := sources.find(recipe.data).curve) is not None:
            draw_adaptation(training.learner, training.episodes, recipe, curve, folder / "adaptation.png")
    return summary


def versions() -> dict[str, str]:
    """Returns the versions of what a result depends on."""
    others = {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")}
    return {"metafast": VERSION, "python": platform.python_version(), **others}


def device_name(device: str) -> str:
    """Names the device in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def table(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Writes the rows of a test as text: the settings of each, and what was measured."""
    settings = [name for name in rows[0] if name not in (metric, "ci95", "tasks")]
    lines = [" ".join(f"{name:>5}" for name in settings) + f"  {metric} with 95% interval"]
    for row in rows:
        values = (f"{row[name]:>{max(5, len(name))}}" for name in settings)
        lines.append(f"{' '.join(values)}  {measured(row, metric)}")
    return "\n".join(lines)


def measured(row: dict[str, Any], metric: str) -> str:
    """Writes ``97.32% ± 0.41% over 600 tasks``."""
    value, half = row[metric], row["ci95"]
    text = f"{value:.2%} ± {half:.2%}" if metric == "accuracy" else f"{value:.4g} ± {half:.2g}"
    return f"{text} over {row['tasks']} tasks"


def draw_curves(lines: Sequence[dict[str, Any]], recipe: Recipe, path: Path) -> None:
    """Draws the training loss, and the metric in training and validation, against the iteration."""
    shown = ["loss", "accuracy"] if recipe.classification else ["loss"]
    figure = require("matplotlib.figure").Figure(figsize=(5 * len(shown), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        train = [(line["iteration"], line[name]) for line in lines if line["kind"] == "train"]
        axes.plot(*zip(*train, strict=True), linewidth=0.8, label="training tasks")
        key = recipe.metric if name != "loss" or not recipe.classification else None
        held_out = [(line["iteration"], line[key]) for line in lines if line["kind"] == "validation" and key]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), marker=".", label="validation tasks")
        if name == "loss":
            axes.set_yscale("log")
        axes.set(xlabel="iteration", ylabel=f"query {name}", title=f"{recipe.name}, {recipe.algorithm}")
        axes.legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def draw_adaptation(
    learner: Learner, episodes: Episodes, recipe: Recipe, curve: tuple[float, float], path: Path, tasks: int = 3
) -> None:
    """Draws test tasks over the interval ``curve``: truth, support points, the model under each test setting."""
    sampler: Any = episodes.test[recipe.test_shots[-1]]
    batch, truth = sampler.batch(0), sampler.truth(0)
    x = torch.linspace(*curve, 200, device=batch.support_x.device).view(1, -1, 1).expand(len(batch), -1, 1)
    fits = [
        (settings, learner.adapt(batch.support_x, batch.support_y, **settings)(x).cpu())
        for settings in learner.test_settings(recipe)
    ]
    figure = require("matplotlib.figure").Figure(figsize=(4.5 * tasks, 3.5), layout="constrained")
    for t, axes in enumerate(figure.subplots(1, tasks, sharey=True)):
        axes.plot(x[t].cpu(), truth(x)[t].cpu(), color="black", linewidth=2, label="truth")
        for settings, fit in fits:
            name = ", ".join(f"{key} {value}" for key, value in settings.items()) or "adapted"
            axes.plot(x[t].cpu(), fit[t], linestyle=":" if settings.get("steps") == 0 else "-", label=name)
        axes.plot(batch.support_x[t].cpu(), batch.support_y[t].cpu(), "^", color="purple", label="support")
        axes.set(xlabel="x", title=f"test task {t + 1}, {recipe.test_shots[-1]} shots")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_fit(support: Sequence[Sequence[float]], fit: Sequence[tuple[float, float]], path: Path) -> None:
    """Draws one's own points and what the adapted model predicts, both given as pairs ``(x, y)``."""
    figure = require("matplotlib.figure").Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*sorted(fit), strict=True), marker=".", label="predicted")
    axes.plot(*zip(*support, strict=True), "^", color="purple", label="support")
    axes.set(xlabel="x", ylabel="y")
    axes.legend()
    figure.savefig(path, dpi=120)
