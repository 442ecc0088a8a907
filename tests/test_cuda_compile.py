"""What ptxas says of the kernels: they need nvcc, and no GPU."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "kernels.cu"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ALONE = ["metafast_inner_loop", "metafast_rule_loop"]
CLUSTERS = [f"{name}_cluster" for name in ALONE]
LOOPS = ALONE + CLUSTERS
KERNELS = {*LOOPS, "metafast_sum_blocks"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")]


@functools.cache
def compiled(arch):
    """The PTX, and ptxas' words."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.cubin"
        command = [NVCC, "-cubin", "-O3", "-std=c++17", f"-arch=sm_{arch}", "-Xptxas=-v", SOURCE, "-o", target]
        command += ["--keep", "--keep-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return (Path(folder) / "kernels.ptx").read_text(), done.stderr


@pytest.fixture(scope="module", params=["80", "90", "100"])
def report(request):
    """ptxas' words by kernel."""
    parts = re.split(r"Compiling entry function '(\w+)'", compiled(request.param)[1])
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_kernel_is_named_after_metafast(report):
    assert set(report) == KERNELS


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_nothing_goes_to_local_memory(report, kernel):
    frame, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report[kernel]))
    assert (frame, stores, loads) == (0, 0, 0)


def registers(report, kernel):
    return int(re.search(r"Used (\d+) registers", report[kernel])[1])


@pytest.mark.parametrize("kernel", CLUSTERS)
def test_a_block_of_the_largest_size_has_registers(report, kernel):
    assert registers(report, kernel) * 256 <= 65536


@pytest.mark.parametrize("kernel", ALONE)
def test_six_blocks_of_64_threads_have_registers(report, kernel):
    assert registers(report, kernel) * 64 * 6 <= 65536


@pytest.fixture(scope="module")
def ptx():
    """The code of each kernel."""
    parts = re.split(r"\.visible \.entry (\w+)", compiled("90")[0])
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("kernel", LOOPS)
def test_no_contraction_is_compiled_away(ptx, kernel):
    """A kind of product, or a height of its tiles, that the compiler drops shows in the PTX: of products and transposed
    ones there are four uses in tiles of 1, 2 and 4 rows, and two outer ones, which kernels by rules unroll less. A
    single use that is missing from the source shows in the twin's numbers instead."""
    outer = 2 * 64 if "rule" not in kernel else 2 * 16
    assert ptx[kernel].count("fma.rn.f32") >= 2 * 4 * 16 * (1 + 2 + 4) + outer
    assert not re.findall(r"\n(\$L\w+):\s*\n(?=\s*\n|\$L|\})", ptx[kernel]), "a branch leads to code that is not there"


@pytest.mark.parametrize("kernel", LOOPS)
def test_tables_come_from_the_constant_bank(ptx, kernel):
    """Some 580 reads of parameters by a computed address are those of tables; from global memory come the user's
    tensors, the maps of parameters and the records of steps, in some 34 reads, and under a rule its hyper-parameters
    and which parameters move, in some 70."""
    assert len(re.findall(r"\bld\.param[.\w]* .*\[%rd", ptx[kernel])) >= 400
    assert len(re.findall(r"\bld\.global", ptx[kernel])) <= (130 if "rule" in kernel else 60)
    assert ".local" not in ptx[kernel]


@pytest.mark.parametrize("kernel", LOOPS)
def test_products_come_with_tensor_cores(ptx, kernel):
    """Six uses of a contraction: three products of TF32, of which plain TF32 takes the last one, and one of bfloat16.
    Loops that are unrolled have more."""
    assert ptx[kernel].count("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32") >= 6 * 3
    assert ptx[kernel].count("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") >= 6


def test_blocks_of_a_cluster_meet_around_all_that_they_exchange(ptx):
    """Two products fetch their inputs and hand out their columns, two transposed ones add parts, two outer ones fetch:
    each between two barriers. So are the sums of rules: of the norm, forward and back, of its adjoint, of the four
    rules' hyper-parameters and of both bounds."""
    of_passes, of_rules = 2 * (2 * (1 + 1) + 2 + 2), 2 * (2 + 1 + 4 + 2)
    expected = {"metafast_inner_loop_cluster": of_passes, "metafast_rule_loop_cluster": of_passes + of_rules}
    for half in ("arrive.release", "wait.acquire"):
        counts = {kernel: code.count(f"barrier.cluster.{half}.aligned") for kernel, code in ptx.items()}
        assert counts == {**dict.fromkeys(KERNELS, 0), **expected}
