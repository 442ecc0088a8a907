"""Micro-benchmarks: the machine's rates, a node of a CUDA graph, a barrier of a cluster, a tile of a product."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl

from metafast import executors
from metafast.executors.native.cuda import CudaExecutor
from metafast.kernels.primitives.launch import TILES
from metafast.kernels.primitives.products import Convolution, gather_product
from metafast.machine import rates

from .setting import H100, Setting, parser, setting
from .timing import graph_ms

NODES = 200
SECONDS = 0.05  # how long each timing lasts
CLUSTERS = (1, 2, 4, 8)  # thread blocks for each task of sin25-5, which shows what its 200 barriers of a cluster cost
# Layers as tasks, samples, pixels a side, channels: of omni5w1s-5 in the support and query pass, and of mini5w1s-5.
LAYERS = ((8, 5, 28, 64), (8, 75, 14, 64), (8, 75, 7, 64), (4, 75, 42, 32))
BLOCKS = ((128, 64, 32), (64, 64, 32), (64, 32, 32), (32, 32, 64))  # rows, columns, depth


@triton.jit
def _tiny(x, WAITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Does next to nothing. With WAITS it waits for the node before it by programmatic dependent launch."""
    if WAITS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = x + tl.arange(0, 32)
    tl.store(at, tl.load(at) + 1.0)


def ceilings(where: Setting) -> None:
    """Measures the rates of a large copy and of a large product in float32."""
    found = rates(where.device, 0.01 if where.rehearsal else 0.4)
    where.results.add("ceilings", product_tflops=found.matrix / 1e12, copy_tb_per_s=found.copy / 1e12)


def nodes(where: Setting) -> None:
    """Times a tiny node in a chain of them, launched as usual and by programmatic dependent launch."""
    count = 2 if where.rehearsal else NODES
    x = torch.zeros(32, device=where.device)
    for dependent in (False, True):
        waits = dependent and not where.rehearsal  # the interpreter has no such launch
        options = {"launch_pdl": True} if waits else {}

        def chain(waits: bool = waits, options: dict[str, bool] = options) -> None:
            for _ in range(count):
                _tiny[(1,)](x, WAITS=waits, num_warps=1, **options)

        chain()
        replay, on_gpu = graph_ms(chain, where.device, where.seconds(SECONDS))
        where.results.add(
            "graph nodes", count=count, dependent_launch=dependent, us_each=1000 * on_gpu / count, replay_ms=replay
        )


def barriers(where: Setting) -> None:
    """Times the same tasks with more blocks for each: a block has less arithmetic, but the cluster's barriers cost
    time."""
    chosen = where.workload("sin25-5")
    tasks = chosen.draw().to(where.device)
    for blocks in CLUSTERS:
        twin = replace(H100, clusters=(blocks,)) if where.rehearsal else None
        one = CudaExecutor(twin, clusters=(blocks,))
        before = list(executors._EXECUTORS)
        executors._EXECUTORS.insert(0, one)  # it comes before the one that chooses the clusters by itself
        try:
            learner = where.learner(chosen)

            call = partial(learner.backward, tasks)
            call()
            _, on_gpu = graph_ms(call, where.device, where.seconds(SECONDS))
            where.results.add("clusters", workload=chosen.name, blocks=blocks, kernels_ms=on_gpu)
        finally:
            executors._EXECUTORS[:] = before


def tiles(where: Setting) -> None:
    """Measures the TFLOP/s of a convolution, by the largest tile that it may use."""
    for tasks, samples, side, channels in ((1, 1, 4, 16),) if where.rehearsal else LAYERS:
        shape = Convolution(side, side, channels, channels, (3, 3), padding=(1, 1)).forward()
        x = torch.randn(tasks, samples, side, side, channels, device=where.device)
        weight = torch.randn(tasks, channels, 3, 3, channels, device=where.device)
        flops, reached = 2 * 9 * channels * x.numel(), {}
        usual = (TILES.rows, TILES.columns, TILES.depth)
        for block in BLOCKS:
            TILES.rows, TILES.columns, TILES.depth = block
            try:
                call = partial(gather_product, [(x, weight)], shape, "float32")
                call()
                _, on_gpu = graph_ms(call, where.device, where.seconds(SECONDS))
                reached["x".join(map(str, block))] = round(flops / on_gpu / 1e9, 3)
            finally:
                TILES.rows, TILES.columns, TILES.depth = usual
        where.results.add("tiles", layer=[tasks, samples, side, channels], tflops=reached)


def main() -> None:
    """Runs all of them; if one fails, the others still run."""
    where, failed = setting(parser(__doc__).parse_args()), []
    for part in (ceilings, nodes, barriers, tiles):
        try:
            part(where)
        except Exception as error:
            failed.append(part.__name__)
            where.results.add(part.__name__, error=f"{type(error).__name__}: {error}"[:400])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
