"""Finds what requires a gradient beside a learner's parameters: tensors of the batch, and tensors that its loss reads.

Their gradients leave the learner, to an encoder in front of it or to a learned loss. No fused path has them: whoever
finds any lets autograd record the inner loop, or refuses the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metafast.executors import Choice
from metafast.inner.recorded import OwnParameter
from metafast.inner.transforms import outside_transforms, plain, plain_batch
from metafast.kernels.contract.layer import Loss, RuleContext
from metafast.learners.left_behind import Place, check_left_behind, places_of_hooks
from metafast.program import Program
from metafast.tasks import Batch, TaskBatch, TaskShapes

_KINDS = 64
"""How many kinds of batches are remembered."""
_INPUTS = ("support_x", "support_y", "query_x", "query_y")
_UNSEEN = (
    "the loss reads a tensor that requires a gradient and that torch.compile cannot see (a value that the function "
    "closes over, or a parameter of the model). Make it a parameter of an nn.Module and pass that as loss, or call the "
    "learner uncompiled"
)


class Outside(NamedTuple):
    """Says what a batch's losses depend on beside the parameters of the inner loop.

    Attributes:
        names: words for each thing that requires a gradient.
        own: the parameters of the model that the loss of the support sets reads by itself.
        closed_over: whether a loss or a rule reads anything that is no parameter of a module.
    """

    names: tuple[str, ...] = ()
    own: tuple[OwnParameter, ...] = ()
    closed_over: bool = False

    def with_rule(self, values: Iterable[Tensor], parameters: Iterable[Tensor]) -> Outside:
        """Adds what a rule reads, of which ``values`` are made, beside its own ``parameters``."""
        seen = {id(p) for p in parameters}
        if all(id(leaf) in seen for value in values if value.requires_grad for leaf in _leaves(value)):
            return self
        return self._replace(names=(*self.names, "a tensor that the rule of the inner loop reads"), closed_over=True)

    def must_be_recorded(self) -> bool:
        """Says whether the computation has to be recorded as it goes forward.

        Else backward records each step anew, which knows of all tensors but those that a loss closes over.
        """
        return self.closed_over


NOTHING = Outside()


class Surroundings(NamedTuple):
    """Holds what computes a batch: the choice of an executor, the Program, and its parameters in their order."""

    choice: Choice
    program: Program
    parameters: list[Tensor]


class LossProbe:
    """Runs a user's losses once on outputs that require no gradient, and sees what they read beside them.

    Args:
        loss: the loss of the support sets.
        query_loss: that of the query sets, if it is another one.

    Attributes:
        needed: whether a loss is one that may read anything beside outputs and targets.
        modules: the modules that the losses are.
    """

    def __init__(self, loss: Loss, query_loss: Loss | None = None) -> None:
        losses = {"support": loss} if query_loss is None else {"support": loss, "query": query_loss}
        self._losses = {part: of_part for part, of_part in losses.items() if _may_read_more(of_part)}
        self._outputs: dict[tuple[str, TaskShapes], tuple[Program, Tensor]] = {}
        self.needed = bool(self._losses)
        self.modules = nn.ModuleList(m for m in map(_module_of, losses.values()) if m is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_outputs": {}}

    def look(self, where: Surroundings, tasks: TaskBatch, judged: bool = True) -> Outside:
        """Finds all that requires a gradient beside the parameters. The query loss counts where the batch is judged."""
        names = [name for name in _INPUTS if getattr(tasks, name).requires_grad]
        own: tuple[OwnParameter, ...] = ()
        closed_over = False
        seen = {id(p) for p in self.modules.parameters()}
        for part in self._losses if judged else self._losses.keys() & {"support"}:
            value = self._run(part, where, tasks)
            if value is not None:
                names.append(f"a tensor that the loss of the {part} sets reads beside outputs and targets")
                closed_over = closed_over or any(id(leaf) not in seen for leaf in _leaves(value))
                own = _reached(value, where.parameters) if part == "support" else own
        return Outside(tuple(names), own, closed_over)

    def check_compiled(self, where: Surroundings, tasks: TaskBatch) -> None:
        """Checks that the losses read nothing that a compiled graph does not see.

        Raises:
            RuntimeError: they read a tensor that requires a gradient and is no parameter of a loss module.
        """
        seen = {id(p) for p in self.modules.parameters()}
        values = [value for part in self._losses if (value := self._run(part, where, tasks)) is not None]
        if any(id(leaf) not in seen for value in values for leaf in _leaves(value)):
            raise RuntimeError(_UNSEEN)

    def check_left_behind(self, model: nn.Module, where: Surroundings, tasks: TaskBatch, places: list[Place]) -> None:
        """Raises ValueError where a loss reads what a run of the model leaves behind, in ``places`` or by a hook."""
        for part, loss in self._losses.items():
            function = getattr(loss, "function", None)
            all_places = [*places, *places_of_hooks(model, function)]
            if loss.kind == "custom_loss" and all_places:
                z, y = self._outputs_of_one(part, where, tasks).detach(), getattr(tasks, part).y[0].detach()
                check_left_behind(model, all_places, partial(loss.function, z, y))

    def _run(self, part: str, where: Surroundings, tasks: TaskBatch) -> Tensor | None:
        """Returns the loss of one task where it requires a gradient although its outputs and targets do not.

        A loss that fails is left to the computation itself, which says what is wrong with it.
        """
        loss = self._losses[part]
        outputs = self._outputs_of_one(part, where, tasks)
        batch: Batch = getattr(tasks, part)
        kept = slice(None) if batch.mask is None else batch.mask[0]
        function = getattr(loss, "function", None) if loss.kind == "custom_loss" else None
        with torch.enable_grad():
            z, y = outputs[kept].clone(), batch.y[0].detach()[kept]
            try:
                value = function(z, y) if function else _by_rules(loss, z, y)
            except Exception:
                return None
        return value if isinstance(value, Tensor) and value.requires_grad else None

    def _outputs_of_one(self, part: str, where: Surroundings, tasks: TaskBatch) -> Tensor:
        """Returns the outputs ``[n, ...]`` of one task; the first batch of its shapes serves all."""
        known, outputs = self._outputs.get((part, tasks.shapes), (None, None))
        if outputs is None or known is not where.program:
            with outside_transforms():
                theta = torch.cat([plain(p).detach().reshape(-1) for p in where.parameters])
                x = getattr(plain_batch(tasks), part).x[:1].detach()
                seeds = torch.zeros(1, dtype=torch.int64, device=x.device) if where.program.draws else None
                outputs = where.choice.executor.predict(where.program, theta, x, 0, seeds)[0]
            self._outputs[part, tasks.shapes] = where.program, outputs
            if len(self._outputs) > _KINDS:
                del self._outputs[next(iter(self._outputs))]
        return outputs


def batch_requires_grad(tasks: TaskBatch) -> bool:
    """Says whether a tensor of the batch requires a gradient."""
    return (
        tasks.support_x.requires_grad
        or tasks.query_x.requires_grad
        or tasks.support_y.requires_grad
        or tasks.query_y.requires_grad
    )


def refuse(learner: str, outside: Outside) -> None:
    """Raises ValueError where ``learner``, whose update is no gradient, would cut off what is outside."""
    if outside.names:
        raise ValueError(
            f"{' and '.join(outside.names)} requires a gradient, and {learner} has none to give: its update is no "
            "gradient of a loss. Pass it detached (.detach(), or requires_grad_(False)), or use MAML"
        )


def _may_read_more(loss: Loss) -> bool:
    """Says whether a loss may read more than outputs and targets: it is the user's own, or has options."""
    of_the_user = loss.kind == "custom_loss" or not type(loss).__module__.startswith("metafast.")
    return of_the_user or bool(loss.options)


def _module_of(loss: Loss) -> nn.Module | None:
    """Returns the module that a user's loss is, or ``None``."""
    function = getattr(loss, "function", None)
    return function if loss.kind == "custom_loss" and isinstance(function, nn.Module) else None


def _by_rules(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    return loss.forward(RuleContext(0, None, (True,), ()), outputs[None], targets[None]).sum()


def _reached(value: Tensor, parameters: Sequence[Tensor]) -> tuple[OwnParameter, ...]:
    """Lists those of ``parameters`` that ``value`` depends on."""
    numbers = [k for k, p in enumerate(parameters) if p.requires_grad]
    with torch.enable_grad():
        trained = [parameters[k] for k in numbers]
        found = torch.autograd.grad(value.sum(), trained, retain_graph=True, allow_unused=True) if trained else ()
    return tuple(OwnParameter(k, parameters[k]) for k, g in zip(numbers, found, strict=True) if g is not None)


def _leaves(value: Tensor) -> list[Tensor]:
    """Lists the tensors that autograd would put gradients into for ``value``."""
    found: list[Tensor] = [] if value.grad_fn is not None else [value]
    seen: set[Any] = set()
    rest: list[Any] = [value.grad_fn]
    while rest:
        function = rest.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        found += [function.variable] if hasattr(function, "variable") else []
        rest += [following for following, _ in function.next_functions]
    return found
