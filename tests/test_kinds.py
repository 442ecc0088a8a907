"""The table of kinds in csrc: what Python is told of it, what a Machine runs, and what does not compile."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from loops import loop

from metafast.executors.native.encode import FACTS, LOSSES
from metafast.executors.native.inner_steps import loop_numbers
from metafast.program.inner_loop import InnerLoop

CORE = Path(__file__).parents[1] / "csrc" / "core"
COMPILER = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")
PROGRAM = """
#define METAFAST_NAMESPACE metafast::test
#include <cstdio>
#include "kinds.h"
using namespace metafast;
int main() {
#define OFFERED(kind, ...) if (test::offers(Need::maps | Need::products, Kind::kind)) std::puts(#kind);
  METAFAST_KINDS(OFFERED)
}
"""


def compiled(folder, table):
    """The program of a core whose ``kinds.h`` is ``table``, with what the compiler says."""
    core = folder / "core"
    shutil.copytree(CORE, core)
    (core / "kinds.h").write_text(table)
    (core / "test.cpp").write_text(PROGRAM)
    command = [COMPILER, "-std=c++17", core / "test.cpp", "-o", folder / "test"]
    return folder / "test", subprocess.run(command, capture_output=True, text=True)


@needs_compiler
def test_a_machine_runs_only_what_it_has_primitives_for(tmp_path):
    program, done = compiled(tmp_path, (CORE / "kinds.h").read_text())
    assert done.returncode == 0, done.stderr
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert {"relu", "leaky_relu", "tanh", "sigmoid", "gelu", "add"} <= set(found)
    assert not {"conv2d", "batch_norm", "layer_norm", "max_pool2d", "avg_pool2d"} & set(found)


@needs_compiler
@pytest.mark.parametrize(
    ("row", "changed"),
    [
        ("input,   in_place,  nonzero, own,      Need::maps", "input,   in_place,  nonzero, Need::maps"),
        ("input,   in_place,  nonzero, own,      Need::maps", "input,   in_place,  zero,    own,      Need::maps"),
        ("Pointwise<Tanh>,      output,", "Pointwise<Tanh>,      neither,"),
    ],
    ids=["a fact is missing", "the header says otherwise", "no such fact"],
)
def test_a_row_that_is_wrong_does_not_compile(tmp_path, row, changed):
    table = (CORE / "kinds.h").read_text()
    assert row in table
    assert compiled(tmp_path, table.replace(row, changed, 1))[1].returncode != 0


@pytest.mark.skipif(not FACTS["kinds"], reason="metafast._C is not built")
def test_python_is_told_every_name_once():
    assert len(set(FACTS["kinds"].values())) == len(FACTS["kinds"])
    assert FACTS["kinds"].keys() >= {"linear", "conv2d", "batch_norm", "flatten"}
    assert "norm_relu_pool" not in FACTS["kinds"], "no layer of a model is one"
    assert LOSSES == ("cross_entropy", "mse")
    assert FACTS["losses"]["cross_entropy"]["reads"] == "labels"


def plan(kind, options):
    """Plans a model ``[n, 3] -> [n, 3]`` of one layer, in numbers as Python writes them."""
    numbers = [FACTS["losses"]["mse"]["number"], 1, 1, 1, 3, 0, 1, kind, 0, -1, -1, -1, 0, len(options), *options]
    description, like = torch.tensor(numbers, dtype=torch.float64), torch.empty(0)
    settings = loop_numbers(loop(1), False, 1 << 20)
    return torch.ops.metafast.cpu_memory(description, 0, 1 << 18, like, 2, 2, 3, (), settings, (0.0, 1.0))


@pytest.mark.skipif(not FACTS["kinds"], reason="metafast._C is not built")
def test_the_numbers_of_a_loop_have_their_places():
    numbers = loop_numbers(InnerLoop(3, (0.0, 0.0, 0.0, 1.0), True, False, True, None, 2, 1, 7), True, 9)
    wanted = {"steps": 3, "first": 2, "truncate": 1, "memory": 7, "first_order": 1, "learns_rates": 0, "one_rate": 1}
    assert dict(zip(FACTS["loop_settings"], numbers, strict=True)) == {**wanted, "each_step": 1, "budget": 9}


def test_a_layer_that_this_build_does_not_know_is_refused():
    """Python may be newer or older than the extension."""
    leaky_relu, kinds = FACTS["kinds"]["leaky_relu"], FACTS["kinds"].values()
    made_by_plans = next(number for number in range(max(kinds)) if number not in kinds)
    assert len(plan(leaky_relu, [0.1])) == len(FACTS["memory_numbers"])
    for kind, options in ((leaky_relu, [0.1, 0.2]), (leaky_relu, []), (made_by_plans, []), (99, [])):
        with pytest.raises(RuntimeError, match=r"a layer of another kind|fewer options|does not know"):
            plan(kind, options)
