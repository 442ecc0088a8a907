"""A layer whose state is a network that learns while it reads: test-time training, one inner step a chunk.

    W_{i+1} = W_i - a grad mean (f(K_i; W_i) - V_i)^2,   answers_i = f(Q_i; W_{i+1}),   K, V, Q = projections of tokens

``f`` is a SwiGLU MLP. Each chunk tells pairs of a key and a value, and asks for some of all told so far, which takes a
memory. The initial weights, the inner rate and the projections are trained through all steps. Beside it stands the dual
form of the same layer: outputs by what the gradients of the steps are made of, without forming the new weights. See
Sun et al. 2024 (2407.04620), and for large chunks and SwiGLU Zhang et al. 2025 (2505.23884).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import hold_to, options_of
from torch import Tensor, nn
from torch.func import functional_call

import metafast as mf


class SwiGLU(nn.Module):
    """Computes ``W_out (silu(W_gate x) * W_up x)``."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(size, hidden, bias=False), nn.Linear(size, hidden, bias=False)
        self.out = nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., D]`` to ``[..., D]``."""
        return self.out(F.silu(self.gate(x)) * self.up(x))


class Changed:
    """Is a matrix ``W_0 - a sum_s g_s x_s^T`` for each sequence, made of ``W_0``, all ``x_s`` and all ``g_s``."""

    def __init__(self, weight: Tensor, rate: Tensor, tasks: int) -> None:
        self.weight, self.rate = weight, rate
        self.g, self.x = (weight.new_zeros(tasks, 0, size) for size in weight.shape)

    def step(self, x: Tensor, g: Tensor) -> None:
        """Takes a step by inputs ``[T, n, D_in]`` and the gradients ``[T, n, D_out]`` in the outputs."""
        self.x, self.g = torch.cat([self.x, x], 1), torch.cat([self.g, g], 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies ``[T, m, D_in]`` by the matrix."""
        return x @ self.weight.T - self.rate * (x @ self.x.mT) @ self.g

    def transposed(self, g: Tensor) -> Tensor:
        """Multiplies ``[T, m, D_out]`` by the transpose of the matrix."""
        return g @ self.weight - self.rate * (g @ self.g.mT) @ self.x


class TTTLayer(nn.Module):
    """Reads chunks that tell ``[T, C, n, D]`` and ask ``[T, C, m, D]``, and returns answers ``[T, C, m, D]``."""

    def __init__(self, size: int, hidden: int, rate: float = 1.0) -> None:
        super().__init__()
        self.key, self.value, self.query = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.fast = mf.FastWeights(SwiGLU(size, hidden), loss="mse", lr=mf.Rate(rate, learn=True))

    def forward(self, told: Tensor, asked: Tensor) -> Tensor:
        """Takes one inner step on what a chunk tells, and answers what it asks."""
        fast, answers = None, []
        for k, v, q in zip(*(t.unbind(1) for t in self.projected(told, asked)), strict=True):
            found, fast = self.fast.after(fast, k, v, q)
            answers.append(found)
        return torch.stack(answers, 1)

    def projected(self, told: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns keys, values and queries."""
        return self.key(told), self.value(told), self.query(asked)

    def dual(self, told: Tensor, asked: Tensor) -> Tensor:
        """Returns the same, and forms no weights but the initial ones.

        A step changes a matrix by ``-a sum_s g_s x_s^T``: ``x_s`` are its inputs, ``g_s`` the gradients in its outputs.
        So ``W_{i+1} q = W_0 q - a sum_s g_s <x_s, q>`` over all that was told, which is linear attention.
        """
        rate, f = self.fast.rate(), self.fast.model
        gate, up, out = (Changed(m.weight, rate, len(told)) for m in (f.gate, f.up, f.out))
        answers = []
        for k, v, q in zip(*(t.unbind(1) for t in self.projected(told, asked)), strict=True):
            z, u = gate(k), up(k)
            h, sigmoid = F.silu(z) * u, torch.sigmoid(z)
            g = 2 * (out(h) - v) / v[0].numel()
            of_h = out.transposed(g)
            of_z = of_h * u * sigmoid * (1 + z * (1 - sigmoid))
            for matrix, inputs, gradients in ((gate, k, of_z), (up, k, of_h * F.silu(z)), (out, h, g)):
                matrix.step(inputs, gradients)
            answers.append(out(F.silu(gate(q)) * up(q)))
        return torch.stack(answers, 1)

    def by_loop(self, told: Tensor, asked: Tensor) -> Tensor:
        """Returns the same by torch alone, one sequence after another, while autograd records every step."""
        f, answers = self.fast.model, []
        for chunks in zip(*self.projected(told, asked), strict=True):
            weights = dict(f.named_parameters())
            for k, v, q in zip(*chunks, strict=True):
                loss = F.mse_loss(functional_call(f, weights, (k,)), v)
                gradients = torch.autograd.grad(loss, [*weights.values()], create_graph=True)
                rate = self.fast.rate().squeeze()
                weights = {name: w - rate * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
                answers.append(functional_call(f, weights, (q,)))
        return torch.stack(answers).reshape(asked.shape)


class Recall(nn.Module):
    """Embeds keys and values, reads them by test-time training, and says which value belongs to each key asked for."""

    def __init__(self, keys: int, values: int, size: int, hidden: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(keys, size), nn.Embedding(values, size)
        self.layer, self.head = TTTLayer(2 * size, hidden), nn.Linear(2 * size, values)

    def forward(self, told: Tensor, asked: Tensor) -> Tensor:
        """Returns logits ``[T, C, m, V]`` for pairs ``[T, C, n, 2]`` told and keys ``[T, C, m]`` asked for."""
        pairs = torch.cat([self.keys(told[..., 0]), self.values(told[..., 1])], -1)
        questions = F.pad(self.keys(asked), (0, self.values.embedding_dim))
        return self.head(self.layer(pairs, questions))


def sequences(count: int, chunks: int, pairs: int, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws ``told [T, C, n, 2]``, ``asked [T, C, n]`` and the right ``answers [T, C, n]``; no key is told twice."""
    keys = torch.rand(count, chunks * pairs).argsort(1)
    told = torch.stack([keys, torch.randint(values, keys.shape)], -1)
    places = torch.cat([torch.randint(pairs * (i + 1), (count, pairs)) for i in range(chunks)], 1)
    asked = told.gather(1, places[..., None].expand(-1, -1, 2))
    return told.reshape(count, chunks, pairs, 2), *asked.reshape(count, chunks, pairs, 2).unbind(-1)


def check() -> None:
    """Compares answers and gradients with those of the plain loop and of the dual form, in float64."""
    layer = TTTLayer(6, 8, rate=2.0).double()
    told, asked, direction = (torch.randn(2, 3, 4, 6).double().requires_grad_() for _ in range(3))
    wanted = [*layer.parameters(), told, asked]
    (found, loop, dual) = (
        [answers.detach(), *torch.autograd.grad((answers * direction).sum(), wanted)]
        for answers in (layer(told, asked), layer.by_loop(told, asked), layer.dual(told, asked))
    )
    hold_to(loop, found, "answers and gradients")
    hold_to(loop, dual, "answers and gradients of the dual form")


def main(given: argparse.Namespace) -> None:
    """Trains the memory, and asks it about sequences that it has not seen."""
    model = Recall(given.chunks * given.pairs, given.values, given.size, given.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(given.iterations):
        told, asked, right = sequences(given.batch, given.chunks, given.pairs, given.values)
        logits = model(told, asked)
        loss = F.cross_entropy(logits.flatten(0, 2), right.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"iteration {step:3}: loss {loss:.3f}, accuracy {(logits.argmax(-1) == right).float().mean():.1%}")
    told, asked, right = sequences(200, given.chunks, given.pairs, given.values)
    with torch.no_grad():
        of_chunks = (model(told, asked).argmax(-1) == right).float().mean((0, 2))
    print("accuracy on new sequences, chunk by chunk:", ", ".join(f"{found:.1%}" for found in of_chunks.tolist()))
    print(f"chance is {1 / given.values:.1%}; learned inner rate: {model.layer.fast.rate.value.item():.2f}")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    return options_of(__doc__, argv, iterations=200, batch=32, chunks=3, pairs=4, values=8, size=16, hidden=64)


if __name__ == "__main__":
    given = options()
    check() if given.check else main(given)
