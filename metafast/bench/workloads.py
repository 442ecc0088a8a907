"""A workload is one meta-gradient to compute. Here are the canonical ones; ``own.py`` makes others.

Their inner rates are low: a 5-step meta-gradient of a batch-normalised network at rate 0.4 is chaotic in float32 in
every library, and no two libraries would agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from metafast.inner.rates import Rate
from metafast.inner.rules import SGD, Adam
from metafast.learners import MAML
from metafast.models import conv4, mlp
from metafast.program.inner_loop import InnerLoop
from metafast.program.rule import Rule
from metafast.tasks import TaskBatch

LR = "lr"
"""The name under which the gradient in a learned rate stands among those of the parameters."""
_ALONG_GRADIENT = SGD()


@dataclass(frozen=True)
class Workload:
    """One second-order meta-gradient in all parameters of the network, all of them adapted.

    Args:
        name: the name under which results are reported.
        network: makes the model, with the same initial values on every call.
        loss: ``"cross_entropy"`` or ``"mse"``.
        sample: the shape of one sample.
        ways: the classes of a task; 0 for regression.
        shots: the support samples of each class; in regression, of each task.
        queries: the query samples, counted in the same way.
        tasks: the number of tasks, T.
        steps: the number of inner steps, S.
        lr: the inner rate.
        inner: what an inner step makes of the gradient.
        each_step: whether every inner step has new support samples, as in training a network. ``shots`` is then the
            number of samples of a step, ``queries`` that of a task, and their classes are drawn at random.
        learns_lr: whether the gradient in the inner rate is computed too.
    """

    name: str
    network: Callable[[], nn.Module]
    loss: str
    sample: tuple[int, ...]
    ways: int
    shots: int
    queries: int
    tasks: int
    steps: int
    lr: float
    inner: Rule = _ALONG_GRADIENT
    each_step: bool = False
    learns_lr: bool = False

    def learner(self, model: nn.Module, **options: Any) -> MAML:
        """Makes the learner whose meta-gradient this is; ``options`` are further ones of :class:`MAML`."""
        lr = Rate(self.lr, learn=True) if self.learns_lr else self.lr
        return MAML(model, loss=self.loss, lr=lr, steps=self.steps, inner=self.inner, **options)

    @property
    def loop(self) -> InnerLoop:
        """The inner loop, which is judged after its last step."""
        return InnerLoop.judged_last(self.steps, learns_rates=self.learns_lr, rule=self.inner)

    def draw(self, seed: int = 0) -> TaskBatch:
        """Draws tasks that depend on ``seed`` alone, in float32 on the CPU.

        In classification a class is a Gaussian cloud around a random picture. In regression every output is
        ``a sin(sum(x) - b)``, with the amplitudes and phases of Finn et al. 2017.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.each_step:
            return self._training(generator)
        make = self._classes(generator) if self.ways else self._sinusoids(generator)
        return TaskBatch(*make(self.shots), *make(self.queries))

    def _training(self, generator: torch.Generator) -> TaskBatch:
        """Draws samples for each step, of classes that overlap.

        With 784 numbers in a sample the centres of two classes lie four standard deviations apart.
        """
        centres = 0.03 * torch.randn(self.tasks, self.ways, *self.sample, generator=generator)

        def make(steps: int, each: int) -> tuple[Tensor, Tensor]:
            y = torch.randint(self.ways, (steps, self.tasks, each), generator=generator)
            x = torch.randn(steps, self.tasks, each, *self.sample, generator=generator).mul_(0.3)
            for step in range(steps):  # one by one, since all at once would need the memory of the samples again
                for t, centre in enumerate(centres):
                    x[step, t] += centre[y[step, t]]
            return x, y

        support, (query_x, query_y) = make(self.steps, self.shots), make(1, self.queries)
        return TaskBatch(*support, query_x[0], query_y[0], each_step=True)

    def _classes(self, generator: torch.Generator) -> Callable[[int], tuple[Tensor, Tensor]]:
        centres = torch.randn(self.tasks, self.ways, 1, *self.sample, generator=generator)

        def make(each: int) -> tuple[Tensor, Tensor]:
            noise = torch.randn(self.tasks, self.ways, each, *self.sample, generator=generator)
            labels = torch.arange(self.ways).repeat_interleave(each).expand(self.tasks, -1)
            return (centres + 0.5 * noise).flatten(1, 2), labels.contiguous()

        return make

    def _sinusoids(self, generator: torch.Generator) -> Callable[[int], tuple[Tensor, Tensor]]:
        output = _output_shape(self.network, self.sample)
        amplitude = 0.1 + 4.9 * torch.rand(self.tasks, 1, generator=generator)
        phase = math.pi * torch.rand(self.tasks, 1, generator=generator)

        def make(each: int) -> tuple[Tensor, Tensor]:
            x = 10 * torch.rand(self.tasks, each, *self.sample, generator=generator) - 5
            y = amplitude * torch.sin(x.flatten(2).sum(2) - phase)
            return x, y.reshape(self.tasks, each, *(1 for _ in output)).expand(-1, -1, *output).contiguous()

        return make


@cache
def _output_shape(network: Callable[[], nn.Module], sample: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of one sample's output. It is cached, because drawing tasks is part of what is profiled."""
    with torch.no_grad():
        return tuple(network()(torch.zeros(2, *sample)).shape[1:])


def regressor() -> nn.Sequential:
    """Makes the sinusoid MLP 1-40-40-1 with torch's usual initial values.

    The paper's (standard deviation 0.01) are so small that second derivatives vanish, and a first-order gradient
    would pass for exact.
    """
    return _with_usual_values(mlp(), 40)


def perceptron() -> nn.Sequential:
    """Makes the MLP 64-256-256-5, whose parameters need more memory than any thread block has."""
    return _with_usual_values(mlp(64, 5, (256, 256)), 256)


def digits() -> nn.Sequential:
    """Makes the MLP 784-128-10, the size of a first network for handwritten digits.

    Half is added to the biases of the hidden layer, so that few activations are near the kink of the ReLU: see
    :func:`classifier`. In a thousand steps one on its other side may grow to 7% of the gradient.
    """
    model = _with_usual_values(mlp(784, 10, (128,)), 128)
    with torch.no_grad():
        model.get_parameter("hidden1.bias").add_(0.5)
    return model


def _with_usual_values(model: nn.Sequential, hidden: int) -> nn.Sequential:
    """Draws parameters between plus and minus ``1/sqrt(fan-in)``, as torch does; a bias takes ``hidden`` for it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            bound = 1 / math.sqrt(parameter.shape[-1] if parameter.dim() > 1 else hidden)
            parameter.uniform_(-bound, bound, generator=generator)
    return model


def classifier(ways: int, channels: int, image: tuple[int, int, int]) -> nn.Sequential:
    """Makes a Conv4 with max-pooling, whose batch norms put few activations near the kink of the ReLU behind them.

    A ReLU that float32 puts on the other side of its kink changes the gradient by far more than rounding does. With
    ``0.3 x + 1`` in the place of ``x`` this happens a hundred times less often, for the same arithmetic.
    """
    return _far_from_kinks(conv4(ways, channels=channels, image=image, pool=True))


def unpadded() -> nn.Sequential:
    """Makes the network of torchbench's ``functorch_maml_omniglot``, ``[n, 1, 28, 28] -> [n, 5]``.

    It has three 3x3x64 convolutions with bias and without padding, each with batch norm, ReLU and 2x2 max-pool, and a
    linear head.
    """
    layers: list[nn.Module] = []
    for inputs in (1, 64, 64):
        norm = nn.BatchNorm2d(64, track_running_stats=False)
        layers += [nn.Conv2d(inputs, 64, 3), norm, nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5))
    generator = torch.Generator().manual_seed(0)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return _far_from_kinks(model)


def _far_from_kinks(model: nn.Sequential) -> nn.Sequential:
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.3)
            nn.init.constant_(module.bias, 1.0)
    return model


def _sinusoid(name: str, tasks: int, steps: int) -> Workload:
    return Workload(
        name, regressor, "mse", sample=(1,), ways=0, shots=10, queries=10, tasks=tasks, steps=steps, lr=0.01
    )


def _pictures(
    name: str, channels: int, image: tuple[int, int, int], ways: int, shots: int, queries: int, tasks: int, steps: int,
    lr: float = 0.01,
) -> Workload:  # fmt: skip
    network = partial(classifier, ways, channels, image)
    return Workload(name, network, "cross_entropy", image, ways, shots, queries, tasks, steps, lr)


# The channels of the network and the shape of an image, [C, H, W].
_OMNIGLOT = (64, (1, 28, 28))
_MINI = (32, (3, 84, 84))
_SIN25_5 = _sinusoid("sin25-5", tasks=25, steps=5)
_OMNI5W1S_5 = _pictures("omni5w1s-5", *_OMNIGLOT, ways=5, shots=1, queries=15, tasks=8, steps=5)
WORKLOADS = {
    workload.name: workload
    for workload in (
        _sinusoid("sin25-1", tasks=25, steps=1),
        _SIN25_5,
        _sinusoid("sin1024-5", tasks=1024, steps=5),
        _sinusoid("sin4096-5", tasks=4096, steps=5),
        _pictures("omni5w1s-1", *_OMNIGLOT, ways=5, shots=1, queries=1, tasks=32, steps=1),
        _OMNI5W1S_5,
        _pictures("omni20w1s-5", *_OMNIGLOT, ways=20, shots=1, queries=1, tasks=16, steps=5, lr=0.003),
        _pictures("mini5w1s-5", *_MINI, ways=5, shots=1, queries=15, tasks=4, steps=5, lr=0.002),
        _pictures("mini5w5s-5", *_MINI, ways=5, shots=5, queries=15, tasks=4, steps=5, lr=0.002),
        # PyTorch publishes one time of MAML: that of this workload with a rate of 0.1 and an Adam step behind it.
        Workload(
            "torchbench-maml",
            unpadded,
            "cross_entropy",
            (1, 28, 28),
            ways=5,
            shots=5,
            queries=15,
            tasks=32,
            steps=5,
            lr=0.003,
        ),
        replace(_SIN25_5, name="sin25-5-adam", lr=0.003, inner=Adam()),
        replace(_OMNI5W1S_5, name="omni5w1s-5-momentum", lr=0.003, inner=SGD(momentum=0.9)),
        # A network is trained for 1,000 steps, and what it has learned is differentiated in what it started from.
        Workload(
            "bilevel-1000",
            digits,
            "cross_entropy",
            (784,),
            ways=10,
            shots=64,
            queries=256,
            tasks=1,
            steps=1000,
            lr=0.05,
            each_step=True,
            learns_lr=True,
        ),
    )
}

# Its parameters need a cluster of thread blocks.
WIDE = Workload(
    "wide5w1s-5", perceptron, "cross_entropy", (64,), ways=5, shots=1, queries=5, tasks=128, steps=5, lr=0.01
)


def workload(name: str) -> Workload:
    """Returns the canonical workload of that name, or ``wide5w1s-5``.

    Raises:
        ValueError: no workload has this name.
    """
    if name not in WORKLOADS and name != WIDE.name:
        raise ValueError(f"workload {name!r} is unknown; choose from {', '.join(WORKLOADS)}")
    return WORKLOADS.get(name, WIDE)
