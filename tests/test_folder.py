"""A user's own images."""

import numpy as np
import pytest
import torch
from PIL import Image

from metafast.episodes import ClassificationSampler, load_folder
from metafast.episodes.sources import folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFAST_CACHE", str(tmp_path / "cache"))


def fill(root, name, count, colour=(10, 200, 30), size=(12, 8)):
    (root / name).mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (colour[0] + i, *colour[1:])).save(root / name / f"{i:03d}.png")


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    for k in range(10):
        fill(root, f"class{k}", 3 + k % 3, colour=(20 * k, 100, 50))
    return root


def test_classes_counts_and_pixels(images):
    splits = load_folder(images, size=6, split=(0.6, 0.2, 0.2))
    parts = [splits.train, splits.validation, splits.test]
    assert [len(p) for p in parts] == [6, 2, 2]
    assert {n for p in parts for n in p.class_names} == {f"class{k}" for k in range(10)}
    for part in parts:
        for position, name in enumerate(part.class_names):
            k = int(name.removeprefix("class"))
            count = int(part.counts[position])
            assert count == 3 + k % 3
            for i in range(count):
                pixels = torch.tensor([20 * k + i, 100, 50], dtype=torch.uint8)
                assert torch.equal(part.images[position, i], pixels[:, None, None].expand(3, 6, 6))


def test_the_sampler_takes_a_ragged_folder(images):
    train = load_folder(images, size=6).train
    batch = ClassificationSampler(train, 3, 1, 2, 50).batch(0)
    assert batch.query_x.shape == (50, 6, 3, 6, 6)
    assert (batch.query_x[:, :, 1] == 100 * torch.tensor(1 / 255)).all()
    with pytest.raises(ValueError, match=r"class 'class\d' has 3 instances, but 1 shots and 3 queries take 4"):
        ClassificationSampler(train, 3, 1, 3, 50)


def test_equal_classes_need_no_counts(tmp_path):
    for k in range(3):
        fill(tmp_path / "d", f"c{k}", 2)
    splits = load_folder(tmp_path / "d", size=4, split=(0.4, 0.3, 0.3))
    assert splits.train.counts is None


def test_centre_crop_and_grayscale(tmp_path):
    pixels = np.zeros((10, 30), dtype=np.uint8)
    pixels[:, 10:20] = 200
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels).save(tmp_path / "d" / name / f"{i}.png")
    splits = load_folder(tmp_path / "d", size=10, channels=1, split=(0.5, 0, 0.5))
    assert splits.train.images.shape == (1, 2, 1, 10, 10)
    assert (splits.train.images == 200).all()


def test_photographs_are_turned_upright(tmp_path):
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was held upside down
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels).save(tmp_path / "d" / name / f"{i}.png", exif=exif)
    image = load_folder(tmp_path / "d", size=8, channels=1, split=(0.5, 0, 0.5)).train.images[0, 0, 0]
    assert torch.equal(image, torch.from_numpy(pixels[::-1].copy()))


@pytest.mark.parametrize("name", ["validation", "valid", "val", None])
def test_split_folders(tmp_path, name):
    root = tmp_path / "d"
    for part, first in (("train", 0), (name, 3), ("test", 5)):
        if part:
            for k in range(2):
                fill(root / part, f"c{first + k}", 2)
    splits = load_folder(root, size=4)
    assert splits.train.class_names == ("c0", "c1")
    assert splits.test.class_names == ("c5", "c6")
    assert (splits.validation.class_names if name else splits.validation) == (("c3", "c4") if name else None)


def test_second_call_reads_the_cache_until_a_file_changes(images, monkeypatch):
    before = load_folder(images, size=6).train.fingerprint
    decode = folder._decode_all
    calls = []
    monkeypatch.setattr(folder, "_decode_all", lambda *args: calls.append(1) or decode(*args))
    assert load_folder(images, size=6).train.fingerprint == before
    assert not calls
    for k in range(10):
        Image.new("RGB", (9, 9), (1, 2, 3)).save(images / f"class{k}" / "000.png")
    assert load_folder(images, size=6).train.fingerprint != before
    assert calls


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder; pass the folder that holds one sub-folder"):
        load_folder(tmp_path / "nowhere")


def test_no_classes(tmp_path):
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(FileNotFoundError, match="has no sub-folders; it must hold one sub-folder of images a class"):
        load_folder(tmp_path)


def test_one_class(tmp_path):
    fill(tmp_path / "d", "only", 5)
    with pytest.raises(ValueError, match="has a single class, 'only'; a task needs at least 2"):
        load_folder(tmp_path / "d")


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(images, count):
    fill(images, "sparse", count)
    (images / "sparse" / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=f"class 'sparse' in .* has {count} images; it needs at least 2"):
        load_folder(images)


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_image(images, data):
    (images / "class4" / "bad.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"class4.bad\.jpg is not a readable image"):
        load_folder(images)


def test_sixteen_bit_image(images):
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(images / "class4" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits a channel"):
        load_folder(images)


def test_class_in_two_splits(tmp_path):
    root = tmp_path / "d"
    for part in ("train", "test"):
        fill(root / part, "cat", 2)
        fill(root / part, f"{part}-only", 2)
    with pytest.raises(
        ValueError, match=r"class 'cat' is both in .*train and in .*test; few-shot splits share no class"
    ):
        load_folder(root)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"size": 0}, "size is 0; it must be an integer of at least 1"), ({"channels": 4}, "channels is 4; it must be 1")],
)
def test_wrong_options(images, options, text):
    with pytest.raises(ValueError, match=text):
        load_folder(images, **options)
