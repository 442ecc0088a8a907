"""How the CUDA part of the extension is built: for which GPUs, and what is said where that cannot be."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def compile_cuda(monkeypatch, tmp_path):
    """``compile_cuda`` with an nvcc that knows three GPUs and notes what it is told. Returns what was told."""
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc" / "build_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\necho compute_80 compute_90 compute_103\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("METAFAST_CUDA", "1")
    monkeypatch.delenv("METAFAST_ARCHS", raising=False)

    def run():
        found = module.compile_cuda(str(tmp_path / "build" / "kernels.o"))
        assert found["objects"] == [str(tmp_path / "build" / "kernels.o")]
        return (tmp_path / "told").read_text().splitlines()[1]

    return run


def test_gpus_that_nvcc_does_not_know_are_left_out_by_default(compile_cuda):
    told = compile_cuda()
    assert re.findall(r"arch=\S+", told) == ["arch=compute_80,code=[sm_80]", "arch=compute_90,code=[sm_90,compute_90]"]


def test_named_gpus_alone_are_compiled_for(compile_cuda, monkeypatch):
    monkeypatch.setenv("METAFAST_ARCHS", "90")
    told = compile_cuda()
    assert told.count("-gencode") == 1
    assert "arch=compute_90,code=[sm_90,compute_90] " in told


@pytest.mark.parametrize("named", ["80,77", "sm_90", "10"])
def test_a_named_gpu_that_nvcc_does_not_know_is_an_error(compile_cuda, monkeypatch, named):
    monkeypatch.setenv("METAFAST_ARCHS", named)
    monkeypatch.delenv("METAFAST_CUDA")  # whatever else is forgiven
    with pytest.raises(ValueError, match=rf"METAFAST_ARCHS='{named}'.*{named[-2:]}.* 80, 90, 103"):
        compile_cuda()


@pytest.mark.skipif(os.environ.get("METAFAST_CPU") != "1", reason="whether there is an extension is left open")
def test_the_extension_is_there_where_it_is_promised():
    """Without it the tests of the native executors are skipped, and nobody hears of it."""
    from metafast import _C  # noqa: F401

    assert torch.ops.metafast.cuda_built() or os.environ.get("METAFAST_CUDA") != "1"
