"""Finds what requires a gradient beside a learner's parameters: tensors of the batch, and tensors that its loss reads.

Their gradients leave the learner, to an encoder in front of it or to a learned loss. No fused path has them: whoever
finds any lets autograd record the inner loop, or refuses the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metafast.executors import Choice
from metafast.inner.recorded import OwnParameter
from metafast.inner.transforms import outside_transforms, plain
from metafast.kernels.contract.layer import Loss, RuleContext
from metafast.learners.compiled import UNSEEN
from metafast.program import Program
from metafast.tasks import TaskBatch, TaskShapes

_INPUTS = ("support_x", "support_y", "query_x", "query_y")


class Outside(NamedTuple):
    """Says what a batch's losses depend on beside the parameters of the inner loop.

    Attributes:
        names: words for each thing that requires a gradient.
        own: the parameters of the model that the loss reads by itself.
    """

    names: tuple[str, ...] = ()
    own: tuple[OwnParameter, ...] = ()


NOTHING = Outside()


def module_of(loss: Loss) -> nn.Module | None:
    """Returns the module that a user's loss is, or ``None``."""
    module = getattr(loss, "module", None) or getattr(loss, "function", None)
    return module if isinstance(module, nn.Module) else None


class LossProbe:
    """Runs a user's loss once on outputs that require no gradient, and sees what it reads beside them.

    Attributes:
        needed: whether the loss is one that may read anything beside outputs and targets.
    """

    def __init__(self, loss: Loss) -> None:
        of_the_user = not type(loss).__module__.startswith("metafast.")
        self.needed = of_the_user or getattr(loss, "function", None) is not None or module_of(loss) is not None
        self._outputs: dict[TaskShapes, tuple[Program, Tensor]] = {}

    def read(
        self, choice: Choice, program: Program, parameters: list[Tensor], tasks: TaskBatch
    ) -> tuple[bool, tuple[OwnParameter, ...]]:
        """Says whether the loss reads any tensor that requires a gradient, and which of ``parameters`` it reads.

        ``parameters`` are those of the program, in its order.
        """
        loss = self._run(choice, program, parameters, tasks)
        if not loss.requires_grad:
            return False, ()
        numbers = [k for k, p in enumerate(parameters) if p.requires_grad]
        trained = [parameters[k] for k in numbers]
        found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True) if trained else ()
        return True, tuple(OwnParameter(k, parameters[k]) for k, g in zip(numbers, found, strict=True) if g is not None)

    def check_compiled(
        self, choice: Choice, program: Program, parameters: list[Tensor], tasks: TaskBatch, seen: list[Tensor]
    ) -> None:
        """Raises RuntimeError where the loss reads a tensor that requires a gradient and is none of ``seen``."""
        loss = self._run(choice, program, parameters, tasks)
        if {id(leaf) for leaf in _leaves(loss)} - {id(tensor) for tensor in seen}:
            raise RuntimeError(UNSEEN)

    def _run(self, choice: Choice, program: Program, parameters: list[Tensor], tasks: TaskBatch) -> Tensor:
        """Returns the loss of one task on outputs and targets that require no gradient."""
        mask = None if tasks.support_mask is None else tasks.support_mask[:1]
        outputs = self._outputs_of_one(choice, program, parameters, tasks)
        with torch.enable_grad():
            context = RuleContext(0, mask, (True,), ())
            return program.loss.forward(context, outputs, tasks.support_y[:1].detach()).sum()

    def _outputs_of_one(self, choice: Choice, program: Program, parameters: list[Tensor], tasks: TaskBatch) -> Tensor:
        """Returns the outputs ``[1, n, ...]`` of one support set; the first batch of its shapes serves all."""
        known, outputs = self._outputs.get(tasks.shapes, (None, tasks.support_x))
        if known is not program:
            with outside_transforms():
                theta = torch.cat([plain(p).detach().reshape(-1) for p in parameters])
                outputs = choice.executor.predict(program, theta, plain(tasks.support_x)[:1].detach())
            self._outputs[tasks.shapes] = program, outputs
        return outputs


def _leaves(value: Tensor) -> list[Tensor]:
    """Lists the tensors that autograd would put gradients into for ``value``."""
    found, seen, rest = [], set(), [value.grad_fn]
    while rest:
        function: Any = rest.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        found += [function.variable] if hasattr(function, "variable") else []
        rest += [following for following, _ in function.next_functions]
    return found


def batch_requires_grad(tasks: TaskBatch) -> bool:
    """Says whether a tensor of the batch requires a gradient."""
    return (
        tasks.support_x.requires_grad
        or tasks.query_x.requires_grad
        or tasks.support_y.requires_grad
        or tasks.query_y.requires_grad
    )


def look(probe: LossProbe, choice: Choice, program: Program, parameters: list[Tensor], tasks: TaskBatch) -> Outside:
    """Finds all that requires a gradient beside ``parameters``."""
    names = [name for name in _INPUTS if getattr(tasks, name).requires_grad]
    own: tuple[OwnParameter, ...] = ()
    if probe.needed:
        reads, own = probe.read(choice, program, parameters, tasks)
        names += ["a tensor that the loss reads beside outputs and targets"] if reads else []
    return Outside(tuple(names), own)


def refuse(learner: str, outside: Outside) -> None:
    """Raises ValueError where ``learner``, whose update is no gradient, would cut off what it found outside."""
    if outside.names:
        raise ValueError(
            f"{' and '.join(outside.names)} requires a gradient, and {learner} has none to give: its update is no "
            "gradient of a loss. Pass it detached (.detach(), or requires_grad_(False)), or use MAML"
        )
