"""The checker of races in the twin's memory sees what a GPU would not forgive: every defect here is planted."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("race_checker.cpp")
COMPILER = shutil.which("c++") or shutil.which("g++")
WRITTEN, READ = "that another one writes before the next barrier", "written that another one reads before the barrier"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What the checker says of each case."""
    program = tmp_path_factory.mktemp("race_checker") / "race_checker"
    subprocess.run([COMPILER, "-std=c++17", "-Wno-psabi", SOURCE, "-o", program], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split(": ", 1) for line in lines)


RIGHT = [
    "apart", "partial sums apart", "a quad", "a quad of global memory", "written, read behind a barrier",
    "written, read by the same thread", "parts that go together", "written ahead, read behind a barrier",
]  # fmt: skip
WRONG = {
    "saved over y": WRITTEN,
    "labels over saved": READ,
    "g over saved": WRITTEN,
    "g over labels": WRITTEN,
    "gd over yd": WRITTEN,
    "gd over saved": WRITTEN,
    "partial sums over what is summed": READ,
    "a quad that is not aligned": "touches byte 20, where no access of 16 bytes is aligned",
    "a label that is not aligned": "touches byte 4, where no access of 8 bytes is aligned",
    "a quad of global memory that is not aligned": "where no access of 16 bytes is aligned",
    "a quad that ends outside": "touches byte 512, outside of the block's memory",
    "written, read": f"thread 40 touches byte 0, {WRITTEN}",
    "read, written": f"thread 40 touches byte 0, {READ}",
    "written, read in the same warp": f"thread 1 touches byte 0, {WRITTEN}",
    "parts of which one reads what the other writes": WRITTEN,
    "written ahead, read": WRITTEN,
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right_passes(verdicts, case):
    assert verdicts[case] == "nothing"


@pytest.mark.parametrize("case", WRONG)
def test_a_planted_defect_is_named(verdicts, case):
    assert re.search(re.escape(WRONG[case]), verdicts[case])
    assert verdicts[case].startswith("twin: thread ")


def test_no_case_is_left_out(verdicts):
    assert set(verdicts) == {*RIGHT, *WRONG}
