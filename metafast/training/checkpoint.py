"""Writes and reads checkpoints: safetensors files with a JSON description and a checksum. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafast.extras import require
from metafast.files import write_atomically

FORMAT = "metafast-checkpoint-2"
# What the checksum is taken over has this in the checksum's own place: so it covers every other byte of the file.
_NO_SUM = "0" * 64


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
    header = {"format": FORMAT, "sha256": _NO_SUM, "description": json.dumps(dict(description), allow_nan=False)}
    content: bytes = serialise(plain, metadata=header)
    written_as = f'"sha256":"{_NO_SUM}"'.encode()
    if content.count(written_as) != 1:
        raise CheckpointError(f"{path} cannot be given a checksum: safetensors writes its header in another way")
    write_atomically(path, content.replace(written_as, f'"sha256":"{hashlib.sha256(content).hexdigest()}"'.encode()))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors (on the CPU) and the description of a checkpoint.

    Raises:
        CheckpointError: no such file, or it is truncated, not a checkpoint of metafast, or damaged in any bit.
    """
    safetensors = require("safetensors")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}; give the folder of a run that `metafast train` wrote")
    content = path.read_bytes()
    remedy = "use another checkpoint or train again"
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} ({len(content)} bytes) is truncated or not a safetensors file ({_one_line(error)}); {remedy}"
        ) from error
    header = _header(content)
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file but not a checkpoint of this metafast "
            f"(its format is {header.get('format')!r}, not {FORMAT!r}); {remedy}"
        )
    noted = header.get("sha256", "")
    found = hashlib.sha256(content.replace(noted.encode(), _NO_SUM.encode(), 1)).hexdigest() if noted else None
    if found != noted:
        raise CheckpointError(
            f"{path} ({len(content)} bytes) is damaged: its content does not match the checksum in it; {remedy}"
        )
    return require("safetensors.torch").load(content), json.loads(header["description"])


def _header(content: bytes) -> dict[str, str]:
    """Returns the texts in the header of a file that safetensors has read without complaint."""
    end = 8 + int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8:end]).get("__metadata__") or {}
    return metadata


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
