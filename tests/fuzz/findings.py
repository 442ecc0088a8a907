"""Programs that earlier versions got wrong, refused, or ran off their fast path: each stays a case."""

from __future__ import annotations

from fuzz.sample import Sample

CLASSES = {"outputs": 3, "loss": '"cross_entropy"', "classes": True}

FINDINGS: dict[str, Sample] = {
    "running statistics of the samples themselves": Sample(
        "nn.Sequential(nn.Flatten(), nn.BatchNorm1d(10), nn.Linear(10, 3))", (1, 5, 2), bn="running", backend="cpu",
        **CLASSES,
    ),
    "no_grad around the body": Sample(
        "nn.Sequential(Frozen(nn.Sequential(nn.Linear(4, 6), nn.ReLU())), nn.Linear(6, 3))", (4,), steps=2, **CLASSES
    ),
    "normalised rows of zeros": Sample(
        "nn.Sequential(nn.Linear(4, 3), Call(lambda x: torch.relu(x - 1)), Call(lambda x: F.normalize(x, dim=1)), "
        "nn.Linear(3, 3))", (4,), steps=2, **CLASSES,
    ),
    "the norm of rows of zeros": Sample(
        "nn.Sequential(nn.Linear(4, 3), Call(lambda x: torch.relu(x - 1)), "
        "Call(lambda x: x / (1 + x.norm(dim=1, keepdim=True))), nn.Linear(3, 3))", (4,), steps=2, **CLASSES,
    ),
    "where over a comparison": Sample(
        "nn.Sequential(nn.Linear(4, 6), Call(lambda x: torch.where(x > 0, x, 0.1 * x)), nn.Linear(6, 3))", (4,),
        steps=2, **CLASSES,
    ),
    "a product with a comparison": Sample(
        "nn.Sequential(nn.Linear(4, 6), Call(lambda x: x * (x > 0)), nn.Linear(6, 3))", (4,), steps=2, **CLASSES
    ),
    "a size as a number": Sample(
        "nn.Sequential(nn.Linear(4, 6), Call(lambda x: torch.tanh(x + x.size(1))), nn.Linear(6, 3))", (4,), **CLASSES
    ),
    "average pooling by the size of the image": Sample(
        "nn.Sequential(nn.Conv2d(2, 3, 3), Call(lambda x: F.avg_pool2d(x, x.size(3))), nn.Flatten(), nn.Linear(3, 3))",
        (2, 6, 6), **CLASSES,
    ),
    "average pooling by a slice of the shape": Sample(
        "nn.Sequential(nn.Conv2d(2, 3, 3), Call(lambda x: F.avg_pool2d(x, x.shape[2:])), nn.Flatten(), "
        "nn.Linear(3, 3))", (2, 6, 5), **CLASSES,
    ),
    "max pooling by the size of the image": Sample(
        "nn.Sequential(nn.Conv2d(2, 3, 3), Call(lambda x: F.max_pool2d(x, x.size(2))), nn.Flatten(), nn.Linear(3, 3))",
        (2, 6, 6), **CLASSES,
    ),
    "a cosine layer": Sample("nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Cosine(6, 3))", (4,), steps=2, **CLASSES),
    "a weight read transposed": Sample("nn.Sequential(Tied(4, 6, True), nn.Linear(4, 3))", (4,), steps=2, **CLASSES),
    "GRU": Sample(
        "nn.Sequential(nn.GRU(3, 4, batch_first=True), Call(lambda x: x[0][:, -1]), nn.Linear(4, 3))", (5, 3),
        **CLASSES,
    ),
    "LSTM": Sample(
        "nn.Sequential(nn.LSTM(3, 4, batch_first=True), Call(lambda x: x[0][:, -1]), nn.Linear(4, 3))", (5, 3),
        **CLASSES,
    ),
    "a shape that is unpacked in a call": Sample(
        "nn.Sequential(nn.Linear(4, 6), Call(lambda x: x.view(*x.shape[:1], 6)), nn.Linear(6, 3))", (4,), **CLASSES
    ),
    "a branch on the number of axes": Sample(
        "nn.Sequential(nn.Linear(4, 6), Call(lambda x: torch.tanh(x) if x.dim() == 2 else x), nn.Linear(6, 3))", (4,),
        **CLASSES,
    ),
    "group norm behind a convolution": Sample(
        "nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))", (2, 6, 6),
        steps=2, **CLASSES,
    ),
    "a layer whose first call reads the input": Sample(
        "nn.Sequential(Twice(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 2))", (5,), 2, steps=3
    ),
    "a skip over a layer of flattened images": Sample(
        "nn.Sequential(nn.Flatten(), Residual(nn.Linear(12, 12)), nn.Linear(12, 2))", (3, 2, 2), 2, steps=2
    ),
    "batch norm of flattened images": Sample(
        "nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2))", (3, 2, 2), 2, support=7, query=7
    ),
    "many tasks with weights of steps and a bias alone": Sample(
        "nn.Linear(2, 2)", (2,), 2, steps=2, adapt=("bias",), step_weights=(0.6, 0.2), tasks=64
    ),
    "learned rates of layers on several threads": Sample(
        "nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 6))", (16,), 6,
        rate="mf.Rate(0.05, 'layer', learn=True)", steps=3, tasks=5, threads=2,
    ),
    "a pooling window in padding alone": Sample(
        "nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(2, 2, 1, count_include_pad=True), nn.Flatten(), "
        "nn.Linear(2, 2))", (1, 1, 1), 2, support=3,
    ),
    "a leaky ReLU beside another reader of its input": Sample(
        "nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 6), SumOf(nn.Linear(6, 3), nn.Sequential(nn.LeakyReLU(0.3), "
        "nn.Linear(6, 3, bias=False))), nn.Linear(3, 5))", (5,), 5, support=7, query=8, dtype="float32",
        backend="twin",
    ),
    "a gradient that a later batch norm cancels, alone": Sample(
        "nn.Sequential(nn.BatchNorm2d(2, eps=0.001), nn.MaxPool2d(3, (2, 1)), nn.Flatten(), "
        "nn.BatchNorm1d(16, eps=0.1, affine=False), nn.BatchNorm1d(16, eps=0.001, affine=False), nn.Linear(16, 3))",
        (2, 9, 4), steps=2, frozen=("0.weight", "5.bias", "5.weight"), bn="task", tasks=7, support=8, query=7,
        seed=1003768, **CLASSES,
    ),
    "norms of features that hardly differ, which rounding decides": Sample(
        "nn.Sequential(nn.InstanceNorm2d(2, eps=0.01, affine=True), nn.BatchNorm2d(2, eps=0.1), nn.LeakyReLU(0.3), "
        "Call(lambda x: x.mean((2, 3))), Tied(2, 7, False), nn.Linear(2, 3), nn.LayerNorm([3]), "
        "nn.BatchNorm1d(3, affine=False), nn.LeakyReLU(), nn.Linear(3, 5))", (2, 3, 6), 5, loss="half_sum",
        rate="mf.Rate((0.01, 0.05), ('step',), learn=True)", tasks=9, support=8, query=7, dtype="float32",
        seed=1009349,
    ),
}  # fmt: skip
