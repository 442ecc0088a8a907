"""The records of the data sets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metafast.episodes import ClassificationSampler, sources
from metafast.training.recipes import RECIPES

FILES = {file.stem for file in Path(sources.__file__).parent.glob("*.py")} - {"__init__"}


def test_every_file_ends_with_the_record_of_its_name():
    assert set(sources.known()) == FILES
    for name in FILES:
        assert "\nSOURCE = Source(" in (Path(sources.__file__).parent / f"{name}.py").read_text()
        assert sources.find(name).name == name


def test_an_unknown_name_gets_those_that_there_are():
    with pytest.raises(ValueError, match=r"there is no data set 'mnist'; choose from folder, glyphs, omniglot, sinus"):
        sources.find("mnist")


def test_optional_packages_are_imported_where_data_are_opened():
    code = """
import sys
for name in ("PIL", "matplotlib"):
    sys.modules[name] = None
from metafast.episodes import sources
print(*sources.known())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, set(found.stdout.split())) == (0, FILES), found.stderr


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_records_fit_the_recipes(recipe):
    source = sources.find(recipe.data)
    assert len(source.sample) == (3 if recipe.classification else 1)
    assert not source.splits or recipe.split in source.splits


def test_samples_have_the_shape_that_the_record_says():
    for name, ways in (("sinusoid", 0), ("glyphs", 3)):
        source = sources.find(name)
        parts = source.open(None, "", "cpu")
        for make in (parts.train, parts.validation, parts.test):
            batch = make(ways, 2, 1, 4, 0, "train").batch(0)
            assert batch.support_x.shape[2:] == source.sample


def test_ink_on_black_is_mostly_black():
    sampler = sources.find("glyphs").open(None, "", "cpu").train(5, 1, 1, 20, 0, "train")
    assert isinstance(sampler, ClassificationSampler)
    assert sources.find("glyphs").ink_on_black
    assert float(sampler.batch(0).support_x.mean()) < 0.5


def test_a_curve_has_a_truth_over_its_interval():
    source = sources.find("sinusoid")
    sampler = source.open(None, "", "cpu").test(0, 50, 1, 20, 0, "test")
    batch, (low, high) = sampler.batch(0), source.curve
    assert low <= float(batch.support_x.min()) < float(batch.support_x.max()) <= high
    assert torch.equal(sampler.truth(0)(batch.support_x), batch.support_y)
