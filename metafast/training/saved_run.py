"""Opens a finished run: to test it again, to look inside, to adapt it to one's own samples."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafast.episodes import pictures, sources
from metafast.learners import Learner
from metafast.training import checkpoint
from metafast.training.build import build_learner, build_model, choose_device
from metafast.training.checkpoint import CheckpointError
from metafast.training.data import open_episodes
from metafast.training.evaluate import final_test, headline
from metafast.training.recipes import Recipe
from metafast.training.report import device_name, draw_fit
from metafast.training.run import BEST, LAST, load_learner


@dataclass(frozen=True)
class Trained:
    """Is a run read back: the learner holds the parameters that its final test judged."""

    recipe: Recipe
    learner: Learner
    checkpoint: Path
    iteration: int
    seed: int
    data: Path | None
    device: str
    trained_on: str | None  # the fingerprint of the training classes, for data that have classes


def open_run(folder: Path, device: str = "auto", backend: str = "auto") -> Trained:
    """Reads a run from its best checkpoint by validation, else from its last.

    Raises:
        CheckpointError: the folder holds no checkpoint, or a damaged one.
    """
    path = folder / (BEST if (folder / BEST).is_file() else LAST)
    tensors, state = checkpoint.load(path)
    try:
        recipe = Recipe.from_json(state["recipe"])
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used here: {error}; train again") from error
    device = choose_device(device)
    learner = build_learner(recipe, build_model(recipe, state["seed"]).to(device), backend)
    load_learner(learner, tensors)
    data = None if state["data"] is None else Path(state["data"])
    trained_on = state["identity"].get("episodes.dataset")
    return Trained(recipe, learner, path, state["iteration"], state["seed"], data, device, trained_on)


def retest(
    run: Trained,
    data: Path | None,
    tasks: int,
    shots: Sequence[int] | None,
    queries: int | None,
    steps: Sequence[int] | None,
    split: str | None = None,
) -> dict[str, Any]:
    """Tests a run on unseen tasks, with other settings where given; ``data`` says where its data lie now.

    Raises:
        ValueError: the data are where they were, but not those that the run was trained on: their test classes may
            not be unseen.
    """
    recipe = replace(
        run.recipe,
        split=run.recipe.split if split is None else split,
        eval_every=0,
        test_shots=tuple(shots or run.recipe.test_shots),
        test_queries=queries or run.recipe.test_queries,
        test_steps=tuple(steps) if steps else run.recipe.test_steps,
    )
    episodes = open_episodes(recipe, data or run.data, run.seed, run.device)
    in_place = run.data is not None and (data or run.data).resolve() == run.data
    if in_place and episodes.train.settings.get("dataset") != run.trained_on:
        raise ValueError(
            f"the training classes in {run.data} are not those that the run was trained on, so those to test on may "
            "not be unseen; restore them and their division, or name other data to test on with --data"
        )
    rows = final_test(run.learner, recipe, episodes, tasks)
    return {
        "recipe": recipe.name,
        "algorithm": recipe.algorithm,
        "metric": recipe.metric,
        "result": headline(rows),
        "tests": rows,
        "queries": recipe.test_queries,
        "batch_norm": run.learner.batch_norm(),
        "checkpoint": run.checkpoint.name,
        "iteration": run.iteration,
        "device": device_name(run.device),
    }


def explain_recipe(recipe: Recipe, device: str, backend: str) -> str:
    """Says what runs a recipe's learner on its meta-batches: which executor runs each layer, and why."""
    device = choose_device(device)
    learner = build_learner(recipe, build_model(recipe, seed=0).to(device), backend)
    samples = recipe.shots * max(recipe.ways, 1)
    return learner.explain(torch.zeros(recipe.tasks, samples, *sources.find(recipe.data).sample, device=device))


@torch.no_grad()
def predict(run: Trained, support: Path, query: Path, steps: int | None, out: Path | None) -> list[dict[str, Any]]:
    """Adapts to ``support`` and predicts ``query``: one row a picture, or one a point.

    ``out`` gets the rows as CSV, or, in regression, a picture if its name ends in .png.

    Raises:
        ValueError: the samples do not fit the run (too many classes, wrong columns); the text says what fits.
        FileNotFoundError: nothing is there.
    """
    kinds = (".csv",) if run.recipe.classification else (".csv", ".png")
    if out is not None and out.suffix not in kinds:
        raise ValueError(f"--out {out} must end in {' or '.join(kinds)}")
    recipe = run.recipe if steps is None else replace(run.recipe, test_steps=(steps,))
    settings = run.learner.test_settings(recipe)[-1]
    rows = (_classify if run.recipe.classification else _regress)(run, support, query, settings)
    if out is not None and out.suffix == ".png":
        draw_fit(_columns(support, ("x", "y")).tolist(), [(row["x"], row["y"]) for row in rows], out)
    elif out is not None:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return rows


def _classify(run: Trained, support: Path, query: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    support_x, support_y, names = _labelled(run, support)
    fast = run.learner.adapt(support_x, support_y, **settings)
    files = pictures.images_in(query) if query.is_dir() else [query]
    if not files:
        raise FileNotFoundError(f"{query} holds no pictures ({', '.join(sorted(pictures.SUFFIXES))})")
    rows = []
    for file in files:
        # Each picture is judged in the company of the support set and of nothing else: batch norm takes its
        # statistics from the pass, so other queries would change the answer.
        x = torch.cat([support_x, _picture(run, file)[None, None]], 1)
        probabilities = fast(x)[0, -1, : len(names)].softmax(-1)
        best = int(probabilities.argmax())
        rows.append({"file": str(file), "class": names[best], "probability": float(probabilities[best])})
    return rows


def _labelled(run: Trained, root: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Reads ``x [1, n, C, H, W]``, ``y [1, n]`` and the classes' names from a folder with one sub-folder a class."""
    classes = {found.name: pictures.images_in(found) for found in pictures.folders_in(root)}
    if len(classes) < 2:
        raise ValueError(f"{root} has {len(classes)} sub-folders; give one sub-folder of pictures a class, at least 2")
    if len(classes) > run.recipe.ways:
        raise ValueError(
            f"{root} has {len(classes)} classes and the run was trained for {run.recipe.ways}; take some away, or "
            f"train with --ways {len(classes)}"
        )
    if empty := [name for name, files in classes.items() if not files]:
        raise ValueError(f"class {empty[0]!r} in {root} holds no pictures ({', '.join(sorted(pictures.SUFFIXES))})")
    x = torch.stack([_picture(run, file) for files in classes.values() for file in files])
    y = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in classes.values()]))
    return x[None], y[None].to(run.device), list(classes)


def _picture(run: Trained, file: Path) -> Tensor:
    """Reads ``[C, H, W]`` as in training. Where that was ink on black, a picture that is mostly light is inverted."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no picture at {file}")
    source = sources.find(run.recipe.data)
    channels, size, _ = source.sample
    pixels = torch.tensor(pictures.read_fitted(file, size, channels)).float() / 255
    if source.ink_on_black and pixels.mean() > 0.5:
        pixels = 1 - pixels
    return pixels.to(run.device)


def _regress(run: Trained, support: Path, query: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    points = _columns(support, ("x", "y"))
    x = _columns(query, ("x",))
    support_x, support_y = points[None, :, :1].to(run.device), points[None, :, 1:].to(run.device)
    y = run.learner.adapt(support_x, support_y, **settings)(x[None].to(run.device))[0]
    return [{"x": float(a), "y": float(b)} for a, b in zip(x[:, 0], y[:, 0].cpu(), strict=True)]


def _columns(path: Path, names: tuple[str, ...]) -> Tensor:
    """Reads the named columns of a CSV file with a header, ``[n, len(names)]``."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in names if name not in (reader.fieldnames or [])]:
            raise ValueError(
                f"{path} has columns {', '.join(reader.fieldnames or ['none'])} and lacks {', '.join(missing)}; "
                f"its first line must be {','.join(names)}"
            )
        rows = []
        for row in reader:
            try:
                rows.append([float(row[name]) for name in names])
            except (TypeError, ValueError) as error:
                found = {name: row[name] for name in names}
                raise ValueError(f"{path}, line {reader.line_num}: {found} is not all numbers") from error
    if not rows:
        raise ValueError(f"{path} holds no points below its header")
    return torch.tensor(rows)
