import json
import os

import pytest
import safetensors.torch
import torch

from metafast.training import checkpoint
from metafast.training.checkpoint import CheckpointError


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, {"a": torch.arange(6.0).view(2, 3), "n": torch.tensor(7)}, {"iteration": 3, "lr": 0.1})
    return path


def test_reads_back_what_it_wrote(saved):
    tensors, description = checkpoint.load(saved)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3))
    assert tensors["n"].dtype == torch.int64
    assert int(tensors["n"]) == 7
    assert description == {"iteration": 3, "lr": 0.1}


def test_views_of_one_storage_are_saved_whole(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    checkpoint.save(tmp_path / "c", {"row": base[1], "transposed": base.t()}, {})
    tensors, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(tensors["row"], base[1])
    assert torch.equal(tensors["transposed"], base.t())


@pytest.mark.parametrize("length", [0, 5, 60, -1])
def test_a_truncated_file_is_refused(saved, length):
    content = saved.read_bytes()
    saved.write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors \(\d+ bytes\) is truncated or not a safetens"):
        checkpoint.load(saved)


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    marker = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save(Trap(), tmp_path / "trap")
    with pytest.raises(CheckpointError, match=r"not a safetensors file"):
        checkpoint.load(tmp_path / "trap")
    assert not marker.exists()


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    (tmp_path / "other").write_bytes(safetensors.torch.save({"weight": torch.ones(2)}, metadata={"format": "pt"}))
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this metafast .its format is 'pt'"):
        checkpoint.load(tmp_path / "other")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"there is no checkpoint at {tmp_path}/none"):
        checkpoint.load(tmp_path / "none")


def test_nan_never_replaces_a_good_checkpoint(saved):
    before = saved.read_bytes()
    with pytest.raises(checkpoint.NotFinite, match=r"weight holds NaN"):
        checkpoint.save(saved, {"weight": torch.tensor([1.0, float("nan")])}, {})
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_failed_write_leaves_the_old_file_alone(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"no space left"):
        checkpoint.save(saved, {"a": torch.zeros(3)}, {})
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_an_optimiser_goes_on_as_if_it_had_never_stopped(make):
    def trained(steps, optimizer, parameters):
        for step in steps:
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() + step)
            optimizer.step()

    straight = [torch.nn.Parameter(torch.linspace(0, 1, 5)), torch.nn.Parameter(torch.ones(2, 2))]
    trained(range(6), make(straight), straight)

    first = [torch.nn.Parameter(torch.linspace(0, 1, 5)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = make(first)
    trained(range(3), optimizer, first)
    tensors, description = checkpoint.pack_optimizer(optimizer)
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = make(second)
    checkpoint.unpack_optimizer(resumed, tensors, json.loads(json.dumps(description)))
    trained(range(3, 6), resumed, second)
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))


def test_differences_name_the_field_and_both_values():
    lines = checkpoint.differences({"shots": 5, "ways": 5, "new": 1}, {"shots": 1, "ways": 5, "old": "x"})
    assert lines == [
        "shots: 5 here, 1 in the checkpoint",
        "new: 1 here, absent in the checkpoint",
        'old: absent here, "x" in the checkpoint',
    ]


def refused(path, content):
    """Writes ``content`` over a checkpoint and returns what is said of it."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as found:
        checkpoint.load(path)
    text = str(found.value)
    assert text.startswith(f"{path} ")
    assert text.endswith("; use another checkpoint or train again")
    assert len(text.splitlines()) == 1
    return text


def test_every_flipped_bit_is_refused_in_one_line(saved):
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    damaged = 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        text = refused(saved, flipped)
        checksum = "does not match the checksum" in text
        damaged += checksum
        assert checksum or bit // 8 < header, text
    assert damaged > 8 * (len(content) - header)  # some bits of the header make another header that can be read
    saved.write_bytes(content)
    checkpoint.load(saved)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.replace(b'"iteration\\": 3', b'"iteration\\": 4'), "does not match the checksum"),
        (lambda c: c.replace(b'"sha256"', b'"sha255"'), "does not match the checksum"),
        (lambda c: c.replace(b"checkpoint-2", b"checkpoint-1"), "its format is 'metafast-checkpoint-1'"),
        (lambda c: c + b"\0", "truncated or not a safetensors file"),
        (lambda c: c[:-4] + os.urandom(4), "does not match the checksum"),
    ],
)
def test_other_damage_is_refused_in_one_line(saved, change, text):
    content = saved.read_bytes()
    assert change(content) != content
    assert text in refused(saved, change(content))
