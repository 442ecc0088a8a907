"""Writes and reads checkpoints, safetensors files with a JSON description in the header. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafast.extras import require
from metafast.files import write_atomically

FORMAT = "metafast-checkpoint-1"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the text says which file, why, and what to do."""


class NotFinite(CheckpointError):
    """A tensor that was to be saved holds NaN or infinity."""


def save(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes tensors and their JSON description into one file, atomically.

    Raises:
        NotFinite: a tensor holds NaN or infinity; what lies at ``path`` is left alone.
    """
    serialise = require("safetensors.torch").save
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"{name} holds NaN or infinity")
    header = {"format": FORMAT, "description": json.dumps(dict(description), allow_nan=False)}
    write_atomically(path, serialise(plain, metadata=header))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors (on the CPU) and the description of a checkpoint.

    Raises:
        CheckpointError: no such file, or it is truncated, damaged or not a checkpoint of metafast.
    """
    safetensors = require("safetensors")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}; give the folder of a run that `metafast train` wrote")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({error}); "
            "use another checkpoint or train again"
        ) from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file but not a checkpoint of metafast "
            f"(its format is {header.get('format')!r}, not {FORMAT!r})"
        )
    return tensors, json.loads(header["description"])


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns what an optimiser has gathered: tensors named ``<parameter>.<key>``, and the rest, which JSON can hold.

    Its settings are left out: those are the recipe's and the device's.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values.setdefault(str(index), {})[key] = value
    return tensors, {"values": values}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Puts what ``pack_optimizer`` took into an optimiser of the same kind, on any device."""
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in description["values"].items()}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Writes one line ``field: wanted, found`` for each entry in which two JSON descriptions differ."""
    missing = object()
    lines = []
    for key in [*wanted, *(k for k in found if k not in wanted)]:
        here, there = wanted.get(key, missing), found.get(key, missing)
        if here != there:
            texts = ["absent" if value is missing else json.dumps(value) for value in (here, there)]
            lines.append(f"{key}: {texts[0]} here, {texts[1]} in the checkpoint")
    return lines
