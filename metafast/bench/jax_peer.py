"""The peer that uses JAX. It translates networks that are an ``nn.Sequential`` of the layers in ``_LAYERS``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from metafast.tasks import TaskBatch
from metafast.verification.inner_updates import InnerUpdate

from .peers import Answer, Peer
from .workloads import LR, Workload

_LAYERS = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Flatten)


class Jax(Peer):
    """Compiles, by ``jax.jit``, the gradient of the mean over the tasks of ``jax.vmap``, in float32.

    Where every step has samples of its own, steps are those of a ``scan``, and ``jax.checkpoint`` keeps nothing of them
    but the parameters.
    """

    name = "JAX jit(vmap)"
    package = "jax"

    def missing(self, workload: Workload, device: str) -> str | None:
        absent = super().missing(workload, device)
        if absent is not None:
            return absent
        model = workload.network()
        layers = list(model) if isinstance(model, nn.Sequential) else [model]
        unknown = sorted({type(layer).__name__ for layer in layers if not _translates(layer)})
        return f"the network cannot be translated: {', '.join(unknown)}" if unknown else None

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        jax = importlib.import_module("jax")
        jax.config.update("jax_default_matmul_precision", "highest")
        if tasks.query_x.device.type != jax.default_backend().replace("gpu", "cuda"):
            raise RuntimeError(f"jax runs on {jax.default_backend()} and the tasks are on {tasks.query_x.device}")
        model = workload.network()
        layers = list(model.named_children())
        start = {name: jax.numpy.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
        if workload.learns_lr:
            start[LR] = jax.numpy.asarray(workload.lr)
        loss = _mse if workload.loss == "mse" else _cross_entropy

        def objective(params: dict, x: Any, y: Any) -> Any:
            for name, layer in layers:
                own = {key: params.get(f"{name}.{key}") for key in ("weight", "bias")}
                x = _apply(jax, layer, own, x)
            return loss(jax, x, y)

        def task(start: dict, sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
            params = dict(start)
            update = InnerUpdate(workload.inner, params.pop(LR, workload.lr), jax.numpy)

            def step(carried: tuple, support: tuple) -> tuple[tuple, None]:
                params, state, count = carried
                return (*update(params, jax.grad(objective)(params, *support), state, count), count + 1), None

            carried = params, update.start(params), 1
            if workload.each_step:
                carried, _ = jax.lax.scan(jax.checkpoint(step), carried, (sx, sy))
            else:
                for _ in range(workload.steps):
                    carried, _ = step(carried, (sx, sy))
            return objective(carried[0], qx, qy)

        def mean(start: dict, *data: Any) -> tuple[Any, Any]:
            of_task = int(workload.each_step)
            losses = jax.vmap(task, (None, of_task, of_task, 0, 0))(start, *data)
            return losses.mean(), losses

        run = jax.jit(jax.grad(mean, has_aux=True))
        tensors = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
        data = [jax.numpy.asarray(np.asarray(tensor.cpu())) for tensor in tensors]

        def call() -> Answer:
            grads, losses = jax.block_until_ready(run(start, *data))
            return losses, grads

        return call


def _translates(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and layer.groups == 1
    if isinstance(layer, nn.MaxPool2d):
        return layer.kernel_size == layer.stride and layer.padding == 0 and not layer.ceil_mode
    return isinstance(layer, _LAYERS)


def _apply(jax: Any, layer: nn.Module, own: dict[str, Any], x: Any) -> Any:
    if isinstance(layer, nn.Linear):
        y = x @ own["weight"].T
        return y if own["bias"] is None else y + own["bias"]
    if isinstance(layer, nn.Conv2d):
        y = _convolution(jax, layer, own["weight"], x)
        return y if own["bias"] is None else y + own["bias"][:, None, None]
    if isinstance(layer, nn.BatchNorm2d):
        centred = x - x.mean((0, 2, 3), keepdims=True)
        y = centred * jax.lax.rsqrt((centred**2).mean((0, 2, 3), keepdims=True) + layer.eps)
        return y if own["weight"] is None else y * own["weight"][:, None, None] + own["bias"][:, None, None]
    if isinstance(layer, nn.MaxPool2d):
        return _max_pool(x, layer.kernel_size)
    return jax.nn.relu(x) if isinstance(layer, nn.ReLU) else x.reshape(x.shape[0], -1)


def _convolution(jax: Any, layer: nn.Conv2d, weight: Any, x: Any) -> Any:
    """Convolves ``x [n, C, H, W]`` with ``weight [K, C, a, b]`` as a matrix product of patches.

    Under vmap ``lax.conv`` becomes a grouped convolution, which is several times slower on a CPU, and whose second
    derivative jit gets wrong there (jax 0.10.2: up to 8% off in float64).
    """
    padding: Any = layer.padding
    (p, q), (s, r), (d, e) = padding, layer.stride, layer.dilation
    x = jax.numpy.pad(x, ((0, 0), (0, 0), (p, p), (q, q)))
    a, b = weight.shape[2:]
    high, wide = x.shape[2] - d * (a - 1), x.shape[3] - e * (b - 1)
    patches = [x[:, :, i * d : i * d + high : s, j * e : j * e + wide : r] for i in range(a) for j in range(b)]
    flat = weight.reshape(*weight.shape[:2], a * b)
    return jax.numpy.einsum("nckhw,ock->nohw", jax.numpy.stack(patches, 2), flat)


def _max_pool(x: Any, size: int | tuple[int, int]) -> Any:
    """Takes the maximum of a reshaped array, whose second derivative is much cheaper than that of a window
    reduction."""
    a, b = (size, size) if isinstance(size, int) else size
    n, c, h, w = x.shape
    return x[:, :, : h // a * a, : w // b * b].reshape(n, c, h // a, a, w // b, b).max((3, 5))


def _mse(jax: Any, outputs: Any, targets: Any) -> Any:
    return ((outputs - targets) ** 2).mean()


def _cross_entropy(jax: Any, outputs: Any, targets: Any) -> Any:
    return -jax.numpy.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], 1).mean()
