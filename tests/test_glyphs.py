"""Rendered characters. Only a few are drawn, but for one slow test that opens them all."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from metafast.episodes import ClassificationSampler, load_glyphs
from metafast.episodes.sources import glyphs

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def typefaces():
    return [glyphs._Typeface(FONTS / f"{name}.ttf") for name in glyphs.FONTS + glyphs.TEX_FONTS]


@pytest.fixture(scope="module")
def bases(typefaces):
    return [t for t in typefaces if t.path.stem in glyphs.BASES]


def codes(text):
    return [ord(c) for c in text]


@pytest.fixture
def few(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(glyphs, "_candidates", lambda typefaces: codes("ABCDEFGHKLМПЖЯΩΨΣ∂∞≈"))


def test_look_alikes_are_one_class(bases):
    latin, greek, cyrillic = codes("AHOP"), codes("ΑΗΟΡ"), codes("АНОР")
    assert not set(latin) & set(greek + cyrillic)
    assert glyphs._distinct(latin + greek + cyrillic, bases) == latin


def test_different_characters_stay(bases):
    kept = codes("ABCDEFGHJKLMNPQRSTUXYZΔΞΣΨΩДЖЯ35")
    assert glyphs._distinct(kept, bases) == kept


def test_sizes_of_one_shape_are_one_class(bases):
    assert glyphs._distinct(codes("oOcCsS"), bases) == codes("ocs")


def test_blank_characters_are_dropped(bases):
    blank = 0x2003  # an em space
    assert all(blank in base.characters and base.glyph(blank) is None for base in bases)
    assert glyphs._distinct([ord("A"), blank], bases) == codes("A")


def test_missing_characters_give_no_fallback_box(typefaces):
    hiragana = 0x3042
    assert all(t.glyph(hiragana) is None for t in typefaces)
    tex = [t for t in typefaces if t.path.stem in glyphs.TEX_FONTS]
    assert len(tex) == 5
    for typeface in tex:
        assert typeface.glyph(ord("A")) is not None
        assert typeface.glyph(ord("{")) is None


def test_candidates(typefaces):
    found = glyphs._candidates(typefaces)
    assert len(found) > 2500
    assert set(codes("AzЖω5?≈")) <= set(found)
    assert not set(codes("█─⠿ \u0301")) & set(found)


def test_same_bytes_every_time(typefaces):
    fresh = [glyphs._Typeface(t.path) for t in typefaces]
    for character in codes("AΩ."):
        assert np.array_equal(
            glyphs._instances(character, typefaces, seed=0), glyphs._instances(character, fresh, seed=0)
        )


def test_seed_and_character_change_the_jitter(typefaces):
    first, other = (glyphs._instances(ord("R"), typefaces, seed) for seed in (0, 1))
    assert not np.array_equal(first, other)
    assert len({image.tobytes() for image in first}) == glyphs.INSTANCES


def test_images_are_inked_and_inside(typefaces):
    for character in codes("A.|WΨ∞"):
        images = glyphs._instances(character, typefaces, seed=0)
        assert images.shape == (20, 28, 28)
        assert images.dtype == np.uint8
        assert (images.max(axis=(1, 2)) > 200).all()
        assert (images.mean(axis=(1, 2)) < 200).all()
        edge = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
        assert (edge > 0).mean() < 0.05


def test_a_class_is_nearer_to_itself_than_to_others(typefaces):
    sets = [glyphs._instances(c, typefaces, 0).reshape(20, -1) / 255 for c in codes("AOIЖ")]
    means = np.stack([s[:10].mean(axis=0) for s in sets])
    images = np.stack([s[10:] for s in sets])
    nearest = ((images[:, :, None] - means) ** 2).sum(axis=3).argmin(axis=2)
    assert (nearest == np.arange(4)[:, None]).mean() > 0.75


def test_load_splits_by_character(few):
    splits = load_glyphs()
    parts = [splits.train, splits.validation, splits.test]
    assert [len(p) for p in parts] == [13, 3, 4]
    assert len({name for p in parts for name in p.class_names}) == 20
    assert splits.train.sample_shape == (1, 28, 28)
    assert splits.train.instances == 20


def test_cache_is_read_and_mended(few, tmp_path, monkeypatch):
    first = load_glyphs().train.fingerprint
    (file,) = tmp_path.glob("glyphs-*.npz")
    file.write_bytes(file.read_bytes()[:5000])
    assert load_glyphs().train.fingerprint == first
    monkeypatch.setattr(glyphs, "_render_all", lambda folder, seed: pytest.fail("rendered again"))
    assert load_glyphs().train.fingerprint == first


def test_seeds_have_caches_of_their_own(few, tmp_path):
    assert load_glyphs(seed=0).train.fingerprint != load_glyphs(seed=1).train.fingerprint
    assert len(list(tmp_path.glob("glyphs-*.npz"))) == 2


def test_missing_pillow_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "metafast\[train\]"'):
        load_glyphs()


@pytest.mark.slow
def test_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFAST_CACHE", str(tmp_path))
    splits = load_glyphs()
    parts = [splits.train, splits.validation, splits.test]
    names = [name for part in parts for name in part.class_names]
    assert len(set(names)) == len(names) >= 1500
    assert all(int(p.images.flatten(3).amax(3).min()) > 100 for p in parts)
    batch = ClassificationSampler(splits.test, 5, 1, 5, 600, stream="nearest").batch(0)
    distance = torch.cdist(batch.support_x.flatten(2), batch.query_x.flatten(2))
    guess = batch.support_y.gather(1, distance.argmin(dim=1))
    accuracy = (guess == batch.query_y).float().mean()
    assert 0.5 < accuracy < 0.8
