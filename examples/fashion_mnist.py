"""Reads Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, 1708.07747; MIT licence): pictures of ten kinds of clothes."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import torch
from torch import Tensor

FOLDER = "/usr/share/datasets/fashion-mnist"
KINDS = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "trainer", "bag", "boot")
_PARTS = {"train": "train", "test": "t10k"}
_BYTES = 0x08  # the code of unsigned bytes in the third byte of an IDX file
_HOW = (
    "Fashion-MNIST comes with Debian's package: apt install dataset-fashion-mnist. Or give --data, the folder of its "
    "four files {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
)


def read(folder: str | Path, part: str) -> tuple[Tensor, Tensor]:
    """Reads the part ``"train"`` or ``"test"``: pictures float32 ``[N, 784]`` in 0..1, and labels int64 ``[N]``.

    Raises:
        FileNotFoundError: a file is missing; the text says how to get it.
        ValueError: a file is damaged, or is not what its name says.
    """
    prefix = Path(folder) / _PARTS[part]
    pictures = read_idx(prefix.with_name(prefix.name + "-images-idx3-ubyte.gz"), 3)
    labels = read_idx(prefix.with_name(prefix.name + "-labels-idx1-ubyte.gz"), 1)
    if pictures.shape[1:] != (28, 28) or len(pictures) != len(labels):
        raise ValueError(
            f"{folder}: {part} has pictures of shape {list(pictures.shape)} and {len(labels)} labels; there should be "
            "as many of both, and pictures of 28 x 28"
        )
    if labels.numel() and labels.max() > 9:
        raise ValueError(f"{folder}: {part} has the label {labels.max()}; they are 0..9")
    return pictures.flatten(1).float() / 255, labels.long()


def read_idx(file: Path, dimensions: int) -> Tensor:
    """Reads an IDX file of bytes, packed by gzip, as a tensor uint8 of so many dimensions.

    Raises:
        FileNotFoundError: there is none; the text says how to get it.
        ValueError: it is damaged, or holds something else.
    """
    try:
        data = gzip.decompress(file.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing. {_HOW}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    begin = 4 + 4 * dimensions
    if len(data) < begin or data[:4] != bytes((0, 0, _BYTES, dimensions)):
        raise ValueError(f"{file} is no IDX file of bytes with {dimensions} dimensions; it begins with {data[:4]!r}")
    shape = [int.from_bytes(data[k : k + 4], "big") for k in range(4, begin, 4)]
    found = torch.frombuffer(bytearray(data[begin:]), dtype=torch.uint8) if len(data) > begin else torch.empty(0)
    if found.numel() != torch.Size(shape).numel():
        raise ValueError(f"{file} is damaged: it holds {found.numel()} bytes, and {shape} of them are announced")
    return found.reshape(shape)
