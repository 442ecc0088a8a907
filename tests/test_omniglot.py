"""Omniglot from archives and folders that are small but laid out like the real ones."""

import io
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from metafast.episodes import load_omniglot
from metafast.episodes.sources import omniglot

BACKGROUND = {"Alpha": 3, "Beta": 2, "Gamma": 4}
EVALUATION = {"Delta": 3, "Epsilon": 2}


def drawing(seed):
    """A 105x105 1-bit PNG with black ink: a bar whose place depends on the seed."""
    pixels = np.ones((105, 105), dtype=bool)
    top = 5 + seed * 7 % 90
    pixels[top : top + 8, 10:95] = False
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def members(half, alphabets, first):
    """Path in the archive -> bytes, in the official layout."""
    number = first
    for alphabet, characters in alphabets.items():
        for c in range(1, characters + 1):
            number += 1
            for drawer in range(1, 21):
                name = f"{half}/{alphabet}/character{c:02d}/{number:04d}_{drawer:02d}.png"
                yield name, drawing(31 * number + drawer)


def write_zip(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def zips(tmp_path):
    root = tmp_path / "zips"
    root.mkdir()
    write_zip(root / "images_background.zip", members("images_background", BACKGROUND, 0))
    write_zip(root / "images_evaluation.zip", members("images_evaluation", EVALUATION, 100))
    return root


@pytest.fixture
def folder(tmp_path, zips):
    root = tmp_path / "folder"
    for half in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(zips / f"{half}.zip") as archive:
            archive.extractall(root)
    return root


def test_layout_names_and_ink(zips):
    splits = load_omniglot(zips)
    assert splits.train.images.shape == (9, 20, 1, 28, 28)
    assert splits.test.class_names == (
        "Delta/character01",
        "Delta/character02",
        "Delta/character03",
        "Epsilon/character01",
        "Epsilon/character02",
    )
    assert splits.validation is None
    image = splits.train.images[0, 4, 0]  # character 1 of Alpha by drawer 5: the bar starts in row 5 + 36*7 % 90
    top = 5 + (31 + 5) * 7 % 90
    rows = torch.nonzero(image[:, 14] > 127).flatten()
    assert abs(rows.float().mean().item() - (top + 3.5) / 3.75 + 0.5) < 0.6
    assert image.max() == 255
    assert (image[0] == 0).all()


def test_folder_and_zips_give_the_same(zips, folder):
    assert load_omniglot(folder).train.fingerprint == load_omniglot(str(zips)).train.fingerprint
    assert load_omniglot(folder).test.fingerprint == load_omniglot(zips).test.fingerprint


def test_second_call_reads_the_cache(zips, monkeypatch):
    first = load_omniglot(zips).test.fingerprint
    monkeypatch.setattr(omniglot, "_decode_all", lambda halves: pytest.fail("decoded again"))
    assert load_omniglot(zips).test.fingerprint == first


def test_a_changed_source_is_decoded_anew(folder):
    before = load_omniglot(folder).test.fingerprint
    target = folder / "images_evaluation" / "Delta" / "character01" / "0101_01.png"
    target.write_bytes(drawing(12345))
    os.utime(target, ns=(1, 1))
    assert load_omniglot(folder).test.fingerprint != before


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_cache_is_made_again(zips, cache, damage):
    good = load_omniglot(zips).train.fingerprint
    (file,) = cache.glob("omniglot-*.npz")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 255
    file.write_bytes({"truncate": data[: len(data) // 3], "flip": data, "empty": b"", "text": b"no archive"}[damage])
    assert load_omniglot(zips).train.fingerprint == good
    assert [f.name for f in cache.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_costs_a_warning(zips, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAFAST_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set METAFAST_CACHE to a folder that can be written"):
        assert len(load_omniglot(zips).train) == 9


def test_xdg_cache_home_is_respected(zips, tmp_path, monkeypatch):
    monkeypatch.delenv("METAFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_omniglot(zips)
    assert len(list((tmp_path / "xdg" / "metafast").glob("omniglot-*.npz"))) == 1


def alphabets(dataset):
    return {name.partition("/")[0] for name in dataset.class_names}


def test_validation_holds_out_whole_alphabets(zips):
    splits = load_omniglot(zips, validation=1)
    assert len(alphabets(splits.validation)) == 1
    assert alphabets(splits.train) | alphabets(splits.validation) == set(BACKGROUND)
    assert not alphabets(splits.train) & alphabets(splits.validation)
    assert alphabets(splits.test) == set(EVALUATION)


def test_maml_split_is_by_character(zips, monkeypatch):
    monkeypatch.setattr(omniglot, "MAML_TRAINING", 10)
    parts = load_omniglot(zips, "maml", validation=2, seed=1)
    names = [p.class_names for p in (parts.train, parts.validation, parts.test)]
    assert list(map(len, names)) == [8, 2, 4]
    assert len({n for part in names for n in part}) == 14
    assert load_omniglot(zips, "maml", seed=1).test.class_names == names[2]
    assert load_omniglot(zips, "maml", seed=2).test.class_names != names[2]


def test_rotations_of_the_training_part(zips):
    plain, turned = load_omniglot(zips), load_omniglot(zips).with_rotations()
    assert (len(turned.train), len(turned.test)) == (36, 5)
    assert torch.equal(turned.train.images[9:18], plain.train.images.rot90(1, (3, 4)))


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; pass the folder that holds images_background"):
        load_omniglot(tmp_path / "nowhere")


def test_path_without_omniglot(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither images_background\.zip nor a folder images_background"):
        load_omniglot(tmp_path)


def test_one_half_missing(zips):
    (zips / "images_evaluation.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither images_evaluation\.zip"):
        load_omniglot(zips)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_broken_zip(zips, keep):
    file = zips / "images_background.zip"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"images_background\.zip is a broken zip archive .* get it again from"):
        load_omniglot(zips)


def test_zip_damaged_inside(zips):
    file = zips / "images_background.zip"
    data = bytearray(file.read_bytes())
    data[100] ^= 255
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"images_background\.zip is a broken zip archive .*CRC"):
        load_omniglot(zips)


def test_zip_with_something_else(zips):
    write_zip(zips / "images_background.zip", [("readme.txt", b"hello")])
    with pytest.raises(FileNotFoundError, match=r"images_background\.zip has no <alphabet>/<character>/<drawing>\.png"):
        load_omniglot(zips)


@pytest.mark.parametrize("data", [b"", b"not a picture", drawing(1)[:60]])
def test_broken_image(zips, data):
    entries = dict(members("images_background", BACKGROUND, 0))
    name = "images_background/Beta/character02/0005_07.png"
    assert name in entries
    entries[name] = data
    write_zip(zips / "images_background.zip", entries.items())
    text = r"Beta/character02/0005_07\.png in .*images_background\.zip is not a readable image"
    with pytest.raises(ValueError, match=text):
        load_omniglot(zips)


def test_missing_drawing(folder):
    (folder / "images_background" / "Alpha" / "character02" / "0002_20.png").unlink()
    with pytest.raises(ValueError, match="19 drawings of Alpha/character02, not 20"):
        load_omniglot(folder)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"split": "lake"}, "split is 'lake'; it must be 'background' or 'maml'"),
        ({"validation": -1}, "validation is -1; it must be 0 or more"),
        ({"validation": 3}, "validation is 3 alphabets; the background has 3 in all"),
        ({"split": "maml"}, "trains on 1200 characters, but only 14 are there"),
    ],
)
def test_wrong_options(zips, options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        load_omniglot(zips, **options)


@pytest.mark.skipif("METAFAST_OMNIGLOT" not in os.environ, reason="METAFAST_OMNIGLOT does not point at the data set")
def test_the_real_data_set():
    splits = load_omniglot(os.environ["METAFAST_OMNIGLOT"], validation=5)
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (964, 659)
    assert [len(alphabets(p)) for p in (splits.train, splits.validation, splits.test)] == [25, 5, 20]
    ink = splits.train.images.float().mean() / 255
    assert 0.05 < ink < 0.12
    maml = load_omniglot(os.environ["METAFAST_OMNIGLOT"], "maml", validation=100).with_rotations()
    assert [len(p) for p in (maml.train, maml.validation, maml.test)] == [4400, 100, 423]
