"""Says which parameters the inner loop has, and where each lies."""

from __future__ import annotations

from torch import nn

from metafast.learners.batch_norm import BatchNormMode, modes_of, norms_of
from metafast.program import Parameter


def rows_per_step(model: nn.Module, bn: BatchNormMode, steps: int) -> nn.ParameterDict:
    """Makes gamma and beta of ``per_step`` batch norm, with a row for each inner step, started from the model's."""
    rows = nn.ParameterDict()
    modes = modes_of(model, bn, {})
    for name, norm in norms_of(model).items():
        for own, parameter in norm.named_parameters(prefix=name, recurse=False):
            if modes[name] == "per_step":
                shape = (steps + 1, *parameter.shape)
                rows[own.replace(".", "/")] = nn.Parameter(parameter.detach().expand(shape).clone())
    return rows


def named_rows(rows: nn.ParameterDict) -> dict[str, nn.Parameter]:
    """Returns the rows by the names of the parameters that they stand for; a ``ParameterDict`` takes no dots."""
    return {name.replace("/", "."): parameter for name, parameter in rows.items()}


def layout_of(model: nn.Module, rows: nn.ParameterDict) -> list[Parameter]:
    """Lists all parameters of the model as a Program that used and moved each of them would have them."""
    by_name = named_rows(rows)
    found: list[Parameter] = []
    for name, parameter in model.named_parameters():
        offset = found[-1].offset + found[-1].size if found else 0
        found.append(Parameter(name, tuple(by_name.get(name, parameter).shape), offset, True))
    return found
