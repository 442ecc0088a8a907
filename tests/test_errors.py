"""Bad input: each is refused before work is lost, by a text that names the value and the remedy."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metafast as mf

T, N, M = 2, 4, 5
r = torch.randn


def labels(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 4


def batch(**parts):
    usual = {"support_x": r(T, N, 3), "support_y": r(T, N, 2), "query_x": r(T, M, 3), "query_y": r(T, M, 2)}
    return mf.TaskBatch(**{**usual, **parts})


def labelled(**parts):
    return batch(**{"support_y": labels(T, N), "query_y": labels(T, M), **parts})


def learner(kind=mf.MAML, model=None, **options):
    return kind(model or models.mlp(), **{"loss": "mse", "lr": 0.1, **options})


def classifier(**options):
    return learner(model=models.mlp(widths=(3, 6, 4)), loss="cross_entropy", **options)


def images(shape):
    x, y = r(T, N, *shape), labels(T, N) % 3
    return learner(model=models.convnet(), loss="cross_entropy")(mf.TaskBatch(x, y, x, y))


def adapted():
    return learner().adapt(r(T, N, 3), r(T, N, 2))


def ones(*shape, dtype=torch.bool):
    return torch.ones(shape, dtype=dtype)


def normed(**options):
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, **options))


def squares(outputs, targets):
    return (outputs - targets) ** 2


def fails(outputs, targets):
    return outputs @ targets


def draws(outputs, targets):
    return (squares(outputs, targets) * torch.rand_like(targets)).mean()


class Counts:
    calls = 0

    def __call__(self, outputs, targets):
        self.calls += 1
        return squares(outputs, targets).mean() / self.calls


def once(outputs, targets):
    return Once.apply(outputs - targets).square().mean()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


ERRORS = [
    # batches
    ("list in place of a tensor", lambda: batch(support_x=[1, 2]), TypeError, ["support_x[0] is a int", "as_tensor"]),
    ("no task axis", lambda: batch(support_x=r(5)), ValueError, ["support_x has shape (5,)", "x[None]"]),
    ("no tasks", lambda: batch(query_x=r(0, M, 3)), ValueError, ["query_x has shape (0, 5, 3)", "at least one"]),
    ("no samples", lambda: batch(support_x=r(T, 0, 3)), ValueError, ["support_x has shape (2, 0, 3)", "at least one"]),
    ("bytes as input", lambda: batch(query_x=ones(T, M, 3, dtype=torch.uint8)), TypeError,
     ["query_x has dtype torch.uint8", "x.float() / 255"]),
    ("complex input", lambda: batch(support_x=r(T, N, 3) + 0j), TypeError, ["torch.complex64", "floating point"]),
    ("numbers of samples differ", lambda: batch(support_y=r(T, 3, 2)), ValueError,
     ["support_x has [T, n] = [2, 4] and support_y has [2, 3]", "agree"]),
    ("numbers of tasks differ", lambda: batch(query_x=r(3, M, 3), query_y=r(3, M, 2)), ValueError,
     ["support_x has 2 tasks and query_x has 3", "task axis T"]),
    ("samples differ", lambda: batch(query_x=r(T, M, 4)), ValueError, ["shape (3,)", "(4,)", "must match"]),
    ("list as a mask", lambda: batch(support_mask=[[True] * N] * T), TypeError,
     ["support_mask is a list", "torch.bool"]),
    ("mask of numbers", lambda: batch(support_mask=ones(T, N, dtype=torch.float32)), ValueError,
     ["support_mask has dtype torch.float32", "torch.bool of shape (2, 4)"]),
    ("mask of another shape", lambda: batch(query_mask=ones(T, 3)), ValueError, ["query_mask", "(2, 3)", "(2, 5)"]),
    ("mask of nothing", lambda: batch(support_mask=~ones(T, N)), ValueError, ["support_mask", "at least one"]),
    ("two devices in a batch", lambda: batch(support_y=r(T, N, 2, device="meta")), ValueError,
     ["support_x is on cpu and support_y on meta", "tasks.to(device)"]),
    ("mask elsewhere", lambda: batch(query_mask=ones(T, M).to("meta")), ValueError, ["query_mask on meta", "tasks.to"]),
    # batches against the model
    ("no TaskBatch", lambda: learner()((r(T, N, 3), r(T, N, 2))), TypeError, ["not a tuple", "mf.TaskBatch(support_x"]),
    ("another device", lambda: learner(model=models.mlp().to("meta"))(batch()), ValueError,
     ["support_x is on cpu", "0.weight on meta", "learner.to(device)"]),
    ("another device, later", lambda: _twice(learner(), batch(), batch().to("meta")), ValueError,
     ["support_x is on meta", "0.weight on cpu", "tasks.to(device)"]),
    ("another dtype", lambda: learner()(batch().to(torch.float64)), TypeError,
     ["support_x has dtype torch.float64", "0.weight torch.float32", "tasks.to(torch.float32)"]),
    ("query of another dtype", lambda: learner()(batch(query_x=r(T, M, 3).double())), TypeError,
     ["query_x has dtype torch.float64", "tasks.to(torch.float32)"]),
    ("targets of another dtype", lambda: learner()(batch(query_y=r(T, M, 2).double())), TypeError,
     ["query_y has dtype torch.float64", "tasks.to(torch.float32)"]),
    ("unknown precision", lambda: learner(precision="tf23"), ValueError, ["'tf23'", "float32", "tf32x3", "bf16"]),
    ("a precision of other devices", lambda: learner(precision="tf32x3")(batch()), RuntimeError,
     ["no precision 'tf32x3'", "cuda", "or precision='float32'"]),
    ("half precision", lambda: learner(model=models.mlp().half())(batch().to(torch.float16)), TypeError,
     ["torch.float16", "float32 and float64", "learner.float()"]),
    ("samples that do not fit", lambda: learner()(batch(support_x=r(T, N, 7), query_x=r(T, M, 7))), ValueError,
     ["module '0' (Linear)", "(4x7 and 3x6)", "4 samples of one task", "have shape [7]"]),
    ("images without channels", lambda: images((9, 7)), ValueError,
     ["module '0' (Conv2d)", "which have shape [9, 7]"]),
    ("images that are too small", lambda: images((2, 2, 2)), ValueError,
     ["module '4' (Conv2d)", "which have shape [2, 2, 2]"]),
    ("a model that merges samples", lambda: learner(model=nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)))(batch()),
     ValueError, ["[4, 3]", "gives [8]", "sample axis"]),
    ("batch norm of one number", lambda: learner(model=normed())(batch(query_x=r(T, 1, 3), query_y=r(T, 1, 2))),
     ValueError, ["module '1' (BatchNorm1d)", "more than 1 value", "bn='frozen'"]),
    # targets
    ("label too high", lambda: classifier()(labelled(query_y=labels(T, M) + 2)), ValueError,
     ["query_y contains the label 5", "4 outputs", "0..3"]),
    ("label below zero", lambda: classifier()(labelled(support_y=labels(T, N) - 1)), ValueError,
     ["support_y contains the label -1", "0..3"]),
    ("label too high in a later batch", lambda: _twice(classifier(), labelled(), labelled(support_y=labels(T, N) + 1)),
     ValueError, ["support_y contains the label 4", "0..3"]),
    ("labels as numbers", lambda: classifier()(labelled(support_y=labels(T, N).float())), TypeError,
     ["support_y has dtype torch.float32", "support_y.long()"]),
    ("labels as one-hot vectors", lambda: classifier()(labelled(query_y=F.one_hot(labels(T, M), 4))), ValueError,
     ["query_y has shape (2, 5, 4)", "labels [T, n, ...]", "probabilities"]),
    ("classes for a sequence", lambda: learner(model=nn.Linear(4, 3), loss="cross_entropy")(
        mf.TaskBatch(r(T, N, 5, 4), labels(T, N), r(T, N, 5, 4), labels(T, N))), ValueError,
     ["output has shape (5, 3)", "callable"]),
    ("targets without an axis", lambda: learner()(batch(support_y=r(T, N))), ValueError,
     ["support_y (2, 4)", "(2,)", "y[..., None]"]),
    ("targets that would be broadcast", lambda: learner()(batch(query_y=r(T, M, 1))), ValueError,
     ["query_y (2, 5, 1)", "Nothing is broadcast"]),
    ("whole numbers as targets", lambda: learner()(batch(support_y=labels(T, N)[..., None].expand(T, N, 2))), TypeError,
     ["support_y has dtype torch.int64", "support_y.float()"]),
    ("probabilities of other classes", lambda: classifier()(labelled(query_y=r(T, M, 5))), ValueError,
     ["query_y has shape (2, 5, 5)", "output has shape (4,)", "probabilities of the outputs' shape"]),
    ("label -1 beside those left out", lambda: classifier()(labelled(support_y=labels(T, N) * 99 - 100)), ValueError,
     ["support_y contains the label -1", "or be -100"]),
    ("class weights of another number", lambda: learner(
        model=nn.Linear(3, 4), loss=nn.CrossEntropyLoss(weight=torch.ones(3)))(labelled()), ValueError,
     ["weight of the cross entropy has shape (3,)", "4 outputs"]),
    ("labels too high for the query loss", lambda: classifier(query_loss=nn.CrossEntropyLoss(label_smoothing=0.1))(
        labelled(query_y=labels(T, M) + 2)), ValueError, ["query_y contains the label 5"]),
    # losses
    ("unknown loss", lambda: learner(loss="crossentropy"), ValueError, ["'crossentropy'", "cross_entropy", "mse"]),
    ("no loss", lambda: learner(loss=None), TypeError, ["loss is None", "cross_entropy"]),
    ("loss of every sample", lambda: learner(loss=squares)(batch()), ValueError, ["shape (4, 2)", "scalar", ".mean()"]),
    ("loss as a Python number", lambda: learner(loss=lambda o, t: squares(o, t).mean().item())(batch()), ValueError,
     ["returned a float", "outputs of shape (4, 2)", ".item()"]),
    ("loss that leaves autograd", lambda: learner(loss=lambda o, t: squares(o.detach(), t).mean())(batch()),
     ValueError, ["test_errors.py", ".detach()"]),
    ("loss that fails", lambda: learner(loss=fails)(batch()), ValueError,
     ["the loss fails", "test_errors.py", "(return outputs @ targets)", "outputs of shape (4, 2)"]),
    ("loss that draws", lambda: learner(loss=draws)(batch()), ValueError, ["the loss draws", "random", "several"]),
    ("loss that counts its calls", lambda: learner(loss=Counts())(batch()), ValueError,
     ["the loss Counts", "changes with each call"]),
    ("loss without a second derivative", lambda: learner(loss=once)(batch()).loss.backward(), ValueError,
     ["cannot be differentiated twice", "first_order=True"]),
    ("loss that takes other targets", lambda: learner(loss=F.huber_loss)(batch(support_y=r(T, N, 7))), ValueError,
     ["the loss huber_loss failed", "targets of shape (4, 7)"]),
    ("class in place of a loss", lambda: learner(loss=nn.MSELoss), TypeError, ["MSELoss is a class", "MSELoss()"]),
    ("loss that is not reduced", lambda: learner(loss=nn.MSELoss(reduction="none")), ValueError,
     ["reduction='none'", "'mean' or 'sum'"]),
    ("unknown loss of query sets", lambda: learner(query_loss="l2"), ValueError, ["'l2'", "mse"]),
    # learners
    ("no module", lambda: learner(model=lambda x: x), TypeError, ["model=<function", "nn.Module"]),
    ("class in place of a module", lambda: mf.MAML(nn.Linear, loss="mse", lr=0.1), TypeError, ["Linear", "instance"]),
    ("no parameters", lambda: learner(model=nn.ReLU()), mf.CaptureError, ["ReLU", "no parameters"]),
    ("no steps", lambda: learner(steps=0), ValueError, ["steps=0", "at least 1"]),
    ("half a step", lambda: learner(steps=1.5), ValueError, ["steps=1.5", "whole number"]),
    ("unknown mode of batch norm", lambda: learner(bn="train"), ValueError, ["bn='train'", "'task'", "'per_step'"]),
    ("no running statistics", lambda: learner(model=normed(track_running_stats=False), bn="frozen"), ValueError,
     ["bn='frozen'", "'1' keeps none", 'bn="task"']),
    ("no momentum", lambda: learner(model=normed(momentum=None), bn="running"), ValueError, ["momentum=None", "0.1"]),
    ("unknown name to adapt", lambda: learner(adapt="haed"), ValueError, ["'haed'", "0.weight"]),
    ("misspelt name to adapt", lambda: learner(adapt=["4.weigth"]), ValueError, ["'4.weigth'", "['4.weight'"]),
    ("module without parameters to adapt", lambda: learner(adapt="1"), ValueError, ["'1'", "0.weight"]),
    ("foreign module to adapt", lambda: learner(adapt=nn.Linear(3, 3)), ValueError, ["Linear", "its own"]),
    ("number to adapt", lambda: learner(adapt=[4]), TypeError, ["4 is neither", "names"]),
    ("nothing to adapt", lambda: learner(adapt=[]), ValueError, ["adapt is empty", "at least one"]),
    ("unused parameters to adapt", lambda: learner(model=models.Unused(), adapt="spare")(batch()), mf.CaptureError,
     ["'spare.weight'", "net.0.weight"]),
    ("unknown head", lambda: learner(mf.ANIL, head="classifier"), ValueError, ["'classifier'", "'4'"]),
    ("too few step weights", lambda: learner(steps=3, step_weights=[1, 2]), ValueError, ["[1, 2]", "3 finite numbers"]),
    ("infinite step weight", lambda: learner(step_weights=[float("inf")]), ValueError, ["[inf]", "finite"]),
    ("only zero step weights", lambda: learner(steps=2, step_weights=[0, 0]), ValueError, ["[0, 0]", "not all zero"]),
    ("step weights that are none", lambda: learner(step_weights=1.0), ValueError, ["step_weights=1.0", "1 finite"]),
    ("unknown inner optimiser", lambda: learner(mf.Reptile, optimizer="adamw"), ValueError,
     ["'adamw'", "'sgd' or 'adam'"]),
    ("empty minibatch", lambda: learner(mf.Reptile, batch_size=0), ValueError, ["batch_size=0", "at least 1"]),
    ("half a sample", lambda: learner(mf.Reptile, batch_size=2.5), ValueError, ["batch_size=2.5", "whole number"]),
    ("learned rate in Reptile", lambda: learner(mf.Reptile, lr=mf.Rate(0.1, learn=True)), ValueError,
     ["Reptile", "learn=False"]),
    ("no epochs of multi-step loss", lambda: learner(mf.MAMLPlusPlus, multi_step_epochs=0), ValueError,
     ["multi_step_epochs=0", "from 1"]),
    ("epoch before the first", lambda: learner(mf.MAMLPlusPlus).at_epoch(-1), ValueError, ["epoch=-1", "from 0"]),
    # rates
    ("rate of zero", lambda: learner(lr=0.0), ValueError, ["lr=0.0", "positive"]),
    ("negative rate", lambda: learner(lr=-0.1), ValueError, ["lr=-0.1", "positive"]),
    ("rate that is no number", lambda: learner(lr=float("nan")), ValueError, ["lr=nan", "finite"]),
    ("rate as a word", lambda: learner(lr="fast"), TypeError, ["lr='fast'", "positive number"]),
    ("rate as a tensor", lambda: learner(lr=torch.tensor(0.1)), TypeError, ["lr=tensor(0.1000)", "positive number"]),
    ("range upside down", lambda: mf.Rate((0.2, 0.1)), ValueError, ["lr=(0.2, 0.1)", "positive"]),
    ("range of three", lambda: mf.Rate((0.1, 0.2, 0.3)), TypeError, ["(0.1, 0.2, 0.3)", "(low, high)"]),
    ("unknown axis of rates", lambda: mf.Rate(0.1, "layers"), ValueError, ["per='layers'", "'layer'"]),
    ("two axes of rates at odds", lambda: mf.Rate(0.1, ("layer", "parameter")), ValueError, ["'layer' or 'parameter'"]),
    # adapted models
    ("negative steps", lambda: learner().adapt(r(T, N, 3), r(T, N, 2), steps=-1), ValueError,
     ["steps=-1", "at least 0"]),
    ("other number of tasks", lambda: adapted()(r(3, N, 3)), ValueError, ["(3, 4, 3)", "T = 2"]),
    ("other samples", lambda: adapted()(r(T, N, 4)), ValueError, ["(2, 4, 4)", "samples of shape (3,)"]),
    ("other dtype of samples", lambda: adapted()(r(T, N, 3).double()), TypeError, ["torch.float64", "torch.float32"]),
    ("task that is not there", lambda: adapted().state_dict(2), IndexError, ["task=2", "0..1"]),
    # executors
    ("unknown backend", lambda: learner(backend="gpu"), ValueError, ["backend='gpu'", "auto", "reference"]),
    ("backend that cannot", lambda: learner(model=models.mlp(nn.SiLU), backend="cpu")(batch()), RuntimeError,
     ["backend='cpu'", "backend='auto'", "reference"]),
]  # fmt: skip


def _twice(learner, first, second):
    learner(first)
    return learner(second)


@pytest.mark.parametrize(("act", "kind", "words"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_bad_input_is_named_with_its_remedy(act, kind, words):
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"
    assert "vmap" not in str(caught.value)


def test_a_refused_batch_leaves_the_learner_as_it_was():
    current = classifier()
    before = copy.deepcopy(current.state_dict())
    for bad in (labelled(query_y=labels(T, M) + 9), labelled(support_x=r(T, N, 8), query_x=r(T, M, 8))):
        with pytest.raises(ValueError, match=r"which have shape \[8\]|labels must lie"):
            current.backward(bad)
    assert all(p.grad is None for p in current.parameters())
    assert all(torch.equal(value, before[name]) for name, value in current.state_dict().items())
    current.backward(labelled())
    assert all(p.grad is not None for p in current.parameters())


@pytest.mark.parametrize(("option", "said"), [("step", "did you mean 'steps'"), ("foo", "it has .*'adapt'.*'steps'")])
def test_an_unknown_option_is_named_with_those_that_there_are(option, said):
    with pytest.raises(TypeError, match=f"MAML has no option '{option}'; {said}"):
        mf.MAML(nn.Linear(2, 2), loss="mse", lr=0.1, **{option: 1})


def test_complex_parameters_are_refused_by_name():
    model = nn.Linear(2, 2)
    model.spectrum = nn.Parameter(torch.randn(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"parameter 'spectrum' is complex.*torch\.view_as_real"):
        mf.MAML(model, loss="mse", lr=0.1)
