"""Runs the outer loop: it trains a recipe in a folder, and can be killed at any moment and resumed to the same bits."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from metafast.episodes import division
from metafast.files import write_json
from metafast.learners import Learner
from metafast.training import checkpoint
from metafast.training.build import build_learner, build_model, choose_device
from metafast.training.checkpoint import CheckpointError
from metafast.training.data import fixed_list, open_episodes
from metafast.training.evaluate import interval, scores
from metafast.training.lock import FolderLock
from metafast.training.metrics import Metrics
from metafast.training.outer_step import WINDOW, OuterStep, graph_obstacle, record_graph
from metafast.training.progress import Progress
from metafast.training.recipes import Recipe

LAST = "checkpoint.safetensors"
BEST = "best.safetensors"
RECIPE = "recipe.json"


class Diverged(RuntimeError):
    """The loss or a parameter became NaN or infinite; the text names the iteration and the last good checkpoint."""


class Interrupted(RuntimeError):
    """Ctrl-C was pressed; the step was finished and a checkpoint written."""


@dataclass(frozen=True)
class Options:
    """Says where and how a recipe runs.

    Attributes:
        out: the run's folder.
        data: the data's folder, for recipes that need one.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
        backend: the executor, ``auto`` for the first that can.
        seed: of the initial parameters and the training episodes.
        resume: go on from the folder's last checkpoint; ``"auto"``: go on if there is one, else start.
        checkpoint_every: iterations between checkpoints.
        tensorboard: write TensorBoard's files too.
        graph: on a GPU, launch an outer step as one CUDA graph where that is possible.
    """

    out: Path
    data: Path | None = None
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0
    resume: bool | Literal["auto"] = False
    checkpoint_every: int = 500
    tensorboard: bool = False
    graph: bool = True

    @property
    def resumes(self) -> bool:
        """Says whether the run goes on from a checkpoint."""
        return (self.out / LAST).exists() if self.resume == "auto" else self.resume


class Training:
    """Is a run between its iterations: it holds all state that the next iteration depends on.

    It holds the run's folder against other processes until ``run`` has ended.

    Raises:
        ValueError: the options do not fit the recipe, or the folder holds a run already.
        InUse: another process trains in the folder.
        CheckpointError: ``resume`` and the folder's checkpoint is missing, damaged, or of another run.
    """

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.options = options
        self.device = choose_device(options.device)
        # A folder that is not there yet is made when all else has turned out well.
        self._lock = FolderLock(options.out) if options.out.is_dir() else None
        _check_folder(options)
        self.episodes = open_episodes(recipe, options.data, options.seed, self.device)
        # Lists of class names are found again from any working folder, and are known by what they say.
        self.recipe = recipe = replace(recipe, split=division.absolute(recipe.split))
        self._division = division.identity(recipe.split)
        model = build_model(recipe, options.seed).to(self.device)
        self.learner = build_learner(recipe, model, options.backend)
        # Settles, before anything is written, whether the chosen executor can run the model.
        tasks = self.episodes.train.batch(0)
        self.executor = self.learner.explain(tasks.support_x)
        obstacle = graph_obstacle(self.learner, tasks) if options.graph else "--no-graph"
        self.launched = "one CUDA graph" if obstacle is None else f"kernel by kernel ({obstacle})"
        recorder = record_graph if obstacle is None else None
        self.outer = OuterStep(recipe, self.learner, self.episodes.train, recorder)
        self.done = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        if self._lock is None:
            options.out.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(options.out)
            _check_folder(options)  # another process may have been quicker
        if options.resumes:
            self._restore()
        else:
            write_json(options.out / RECIPE, recipe.to_json())
            self.save(LAST)

    @property
    def identity(self) -> dict[str, Any]:
        """Holds what two runs must share for one to go on from the other's checkpoint."""
        identity = self.recipe.to_json()
        for judging in ("note", "eval_every", "eval_tasks", "test_shots", "test_queries", "test_steps"):
            identity.pop(judging)
        if self.recipe.schedule == "constant":
            identity.pop("iterations")
        identity["split"] = self._division
        return {**identity, **{f"episodes.{k}": v for k, v in self.episodes.train.settings.items()}}

    def run(self, progress: Progress) -> None:
        """Trains to the recipe's last iteration.

        Raises:
            Diverged: a loss or a parameter is NaN or infinite.
            Interrupted: SIGINT came; a checkpoint has been written.
        """
        options, recipe = self.options, self.recipe
        lock, self._lock = self._lock or FolderLock(options.out), None
        with lock, Metrics(options.out, self.done, options.tensorboard) as metrics, _Interrupts() as interrupts:
            if self.device.startswith("cuda"):
                progress.note(f"outer step: {self.launched}")
            progress.start(self.done, recipe.iterations)
            try:
                self._since, self._reported = time.perf_counter(), (self.done, self.seconds)
                while self.done < recipe.iterations:
                    self.step()
                    progress.step(self.done)
                    if self.done % WINDOW == 0 or self.done == recipe.iterations:
                        self._report(metrics, progress)
                    if recipe.eval_every and self.done % recipe.eval_every == 0:
                        self._untimed(lambda: self._validate(metrics, progress))
                    if interrupts.seen or self.done % options.checkpoint_every == 0:
                        self._untimed(lambda: self.save(LAST))
                    if interrupts.seen:
                        raise Interrupted(
                            f"interrupted after iteration {self.done}, which is saved; "
                            f"go on with the same command and --out {options.out} --resume"
                        )
            finally:
                progress.close()
            self.save(LAST)

    def step(self) -> None:
        """Takes one outer step."""
        self.outer(self.done)
        self.done += 1

    def save(self, name: str) -> None:
        """Writes the whole state into the folder, unless it holds NaN or infinity.

        Raises:
            Diverged: it does.
        """
        self._recent()
        moments, description = checkpoint.pack_optimizer(self.outer.optimizer)
        tensors = {"window": self.outer.window}
        tensors |= {f"learner.{key}": value for key, value in self.learner.state_dict().items()}
        tensors |= {f"optimizer.{key}": value for key, value in moments.items()}
        state = {
            "iteration": self.done, "seconds": self.seconds, "best": self.best, "optimizer": description,
            "recipe": self.recipe.to_json(), "identity": self.identity, "seed": self.options.seed,
            "data": None if self.options.data is None else str(self.options.data.resolve()),
        }  # fmt: skip
        try:
            checkpoint.save(self.options.out / name, tensors, state)
        except checkpoint.NotFinite as error:
            raise self._diverged(self.done, str(error)) from error

    def load_tested(self) -> dict[str, Any]:
        """Loads the parameters that the final test judges, and says which: the best validated, else the last."""
        if self.best is None or not self.recipe.eval_every:
            return {"checkpoint": LAST, "iteration": self.done, "chosen_by": "last iteration"}
        tensors, _ = checkpoint.load(self.options.out / BEST)
        load_learner(self.learner, tensors)
        return {"checkpoint": BEST, **self.best, "chosen_by": f"validation {self.recipe.metric}"}

    def _restore(self) -> None:
        path = self.options.out / LAST
        tensors, state = checkpoint.load(path)
        wanted: dict[str, Any] = self.identity
        if differing := checkpoint.differences(wanted, state["identity"]):
            raise CheckpointError(
                f"{path} belongs to another run ({'; '.join(differing)}); give the options that it was started "
                "with, or another --out"
            )
        if state["iteration"] > self.recipe.iterations:
            raise CheckpointError(
                f"{path} is at iteration {state['iteration']}, past --iterations {self.recipe.iterations}"
            )
        load_learner(self.learner, tensors)
        moments = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        checkpoint.unpack_optimizer(self.outer.optimizer, moments, state["optimizer"])
        self.outer.window.copy_(tensors["window"])
        self.done, self.seconds, self.best = state["iteration"], state["seconds"], state["best"]

    def _recent(self) -> Tensor:
        """Returns loss and score of the iterations since the last report, ``[n, 2]``, known to be finite."""
        count = self.done % WINDOW or min(self.done, WINDOW)
        recent = self.outer.window[:count].cpu()
        bad = (~torch.isfinite(recent[:, 0])).nonzero()
        if len(bad):
            iteration = self.done - count + int(bad[0]) + 1
            raise self._diverged(iteration, f"the loss is {float(recent[bad[0], 0])}")
        return recent

    def _report(self, metrics: Metrics, progress: Progress) -> None:
        recent = self._recent().double().mean(0)
        self._tick()
        done, seconds = self._reported
        rate = (self.done - done) * self.recipe.tasks / (self.seconds - seconds)
        self._reported = (self.done, self.seconds)
        values = {"loss": float(recent[0])}
        if self.recipe.classification:
            values["accuracy"] = float(recent[1])
        metrics.write(self.done, "train", **values, lr=self.recipe.lr_at(self.done - 1), tasks_per_s=rate)
        left = (self.recipe.iterations - self.done) * self.seconds / self.done
        progress.report(self.done, {**values, "tasks_per_s": rate}, left)

    def _validate(self, metrics: Metrics, progress: Progress) -> None:
        recipe, sampler = self.recipe, self.episodes.validation
        assert sampler is not None  # open_episodes has seen to it
        settings = self.learner.test_settings(recipe)[-1]
        found = scores(self.learner, fixed_list(sampler, recipe.eval_tasks), settings, recipe.classification)
        value, half = interval(found)
        metrics.write(self.done, "validation", **{recipe.metric: value, "ci95": half})
        progress.note(f"iteration {self.done}: validation {recipe.metric} {value:.4f} ± {half:.4f}")
        sign = 1 if recipe.classification else -1
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best["value"]):
            self.best = {"iteration": self.done, "value": value}
            self.save(BEST)

    def _untimed(self, work: Callable[[], None]) -> None:
        self._recent()
        self._tick()
        work()
        self._since = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def _diverged(self, iteration: int, why: str) -> Diverged:
        path = self.options.out / LAST
        good = checkpoint.load(path)[1]["iteration"] if path.is_file() else None
        kept = "nothing was saved yet" if good is None else f"{path} still holds iteration {good}"
        lower = "Lower --lr" if self.recipe.inner_lr is None else "Lower --inner-lr or --lr"
        fewer = "" if self.recipe.steps is None else ", or use fewer --steps"
        return Diverged(f"iteration {iteration}: {why}; {kept}. {lower}{fewer}")


def load_learner(learner: Learner, tensors: dict[str, Tensor]) -> None:
    """Puts a checkpoint's parameters into a learner.

    Raises:
        CheckpointError: they belong to another model; the text names the tensors that do not fit.
    """
    state = {k.removeprefix("learner."): v for k, v in tensors.items() if k.startswith("learner.")}
    wanted = {k: list(v.shape) for k, v in learner.state_dict().items()}
    if differing := checkpoint.differences(wanted, {k: list(v.shape) for k, v in state.items()}):
        raise CheckpointError(f"the checkpoint holds another model: {'; '.join(differing)}")
    learner.load_state_dict(state)


def _check_folder(options: Options) -> None:
    if options.checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every is {options.checkpoint_every}; it must be at least 1")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file; give a folder")
    if options.resume not in (True, False, "auto"):
        raise ValueError(f"--resume is {options.resume!r}; give it alone, or --resume auto")
    last = options.out / LAST
    if options.resume is True and not last.is_file():
        raise CheckpointError(
            f"there is no checkpoint at {last} to resume; leave out --resume to start a run, or give "
            "--resume auto, which starts one where there is none"
        )
    if not options.resumes and last.exists():
        raise ValueError(f"{options.out} holds a run already; add --resume to go on with it, or give another --out")


class _Interrupts:
    """Turns the first SIGINT into a flag, so that the step at work can end; a second one acts as usual."""

    seen = False

    def __enter__(self) -> _Interrupts:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, self._before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._before)
