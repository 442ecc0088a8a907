"""Runs the outer step: tasks, meta-gradient, clipping, optimiser. On a GPU it is one CUDA graph where it can be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metafast.episodes import Sampler
from metafast.executors.cuda_graphs import CudaGraph
from metafast.learners import Learner
from metafast.tasks import TaskBatch
from metafast.training.evaluate import task_scores
from metafast.training.recipes import Recipe

# The window has this many rows: iterations between two reads of the losses. To read at every step would stall a GPU.
WINDOW = 25
# Tasks of this many bytes are drawn at once: a draw of few bytes costs as much as one of many.
AHEAD = 1 << 20

# A recorder takes a function and, without running it, gives one that does what it would do on the device.
Recorder = Callable[[Callable[[], None], torch.device], Callable[[], None]]


class OuterStep:
    """Runs a recipe's iterations, ``theta <- optimiser(theta, clip(d/dtheta mean_t L_t))`` on the tasks of each.

    All that differs between them lies on the device: the number of the iteration, the outer rate, parameters, the
    optimiser's state; and what the learner's schedule sets, which a recording holds as it was. So one can be recorded
    and replayed for all that share these settings. With a recorder, the first iteration under new settings runs as it
    is (kernels are compiled, caches filled); from the second on a recording is replayed.

    Attributes:
        optimizer: its ``lr`` is a tensor that each iteration sets.
        window: ``[WINDOW, 2]``; row ``i % WINDOW`` holds the mean query loss of iteration ``i`` and, in classification,
            its accuracy.
    """

    def __init__(self, recipe: Recipe, learner: Learner, sampler: Sampler, recorder: Recorder | None = None) -> None:
        self.recipe, self.learner, self.sampler, self.recorder = recipe, learner, sampler, recorder
        self.optimizer = learner.outer_optimizer(recipe.lr)
        self.device = next(learner.parameters()).device
        self.window = torch.zeros(WINDOW, 2, device=self.device)
        self._iteration = torch.zeros((), dtype=torch.int64, device=self.device)
        self._settings: tuple[object, ...] | None = None
        self._replay: Callable[[], None] | None = None
        self._drawn: TaskBatch | None = None
        self._first, self._count = 0, 1

    def __call__(self, iteration: int) -> None:
        """Runs the iteration of that number, counted from 0."""
        settings = self._set(iteration)
        if self.recorder is None:
            self._run(self._tasks(iteration))
        elif settings != self._settings:
            self._settings, self._replay = settings, None
            self._draw_and_run()
        else:
            self._replay = self._replay or self.recorder(self._draw_and_run, self.device)
            self._replay()

    def _tasks(self, iteration: int) -> TaskBatch:
        """Returns the iteration's tasks, which are drawn with those of the iterations behind it."""
        if self._drawn is None or not self._first <= iteration < self._first + self._count:
            if self._drawn is not None:
                size = (self._drawn.support_x.nbytes + self._drawn.query_x.nbytes) // self._count
                self._count = max(1, AHEAD // size)
            steps = torch.arange(iteration, iteration + self._count, device=self.device)
            self._first, self._drawn = iteration, self.sampler.batch(steps)
        tasks, at = len(self._drawn) // self._count, iteration - self._first
        return self._drawn.tasks(slice(at * tasks, (at + 1) * tasks))

    def _set(self, iteration: int) -> tuple[object, ...]:
        """Sets what differs from the last iteration. Returns what a recording holds as it was."""
        self._iteration.fill_(iteration)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(self.recipe.lr_at(iteration))
        return self.learner.schedule(iteration, self.recipe.iterations)

    def _draw_and_run(self) -> None:
        self._run(self.sampler.batch(self._iteration))

    def _run(self, tasks: TaskBatch) -> None:
        """Reads no value of a tensor on the host, as long as the tasks are on a GPU."""
        self.optimizer.zero_grad()
        out = self.learner.backward(tasks)
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grad_value_(self.learner.parameters(), self.recipe.clip)
        self.optimizer.step()
        measured = [out.loss, self._score(out.outputs, tasks)]
        self.window.index_copy_(0, self._iteration.remainder(WINDOW)[None], torch.stack(measured)[None])

    def _score(self, outputs: Tensor, tasks: TaskBatch) -> Tensor:
        if not self.recipe.classification:
            return outputs.new_zeros(())
        return task_scores(outputs, tasks.query_y, True).mean()


def graph_obstacle(learner: Learner, tasks: TaskBatch) -> str | None:
    """Says why no CUDA graph can hold an outer step on batches like ``tasks``; it is ``None`` where one can."""
    if not tasks.support_x.is_cuda:
        return f"device {tasks.support_x.device} has no CUDA graphs"
    return learner.graph_obstacle(tasks)


def record_graph(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Records CUDA graphs.

    Raises:
        RuntimeError: CUDA refuses; the text says why, and how to train all the same.
    """
    try:
        return CudaGraph(run, device).replay
    except RuntimeError as error:
        raise RuntimeError(
            f"the outer step could not be recorded as a CUDA graph ({error}); --no-graph trains without one"
        ) from error
