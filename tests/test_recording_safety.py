"""A recording leaves the module, torch and other threads alone, and takes no longer than what it records."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_capture import Call
from test_recording import batch, gradient, unrolled
from torch import nn

import metafast as mf
from metafast.learners.double_check import run_module
from metafast.program.recording import record
from metafast.program.second_look import Difference


class Triple(torch.autograd.Function):
    """Squares, with three times the derivative of the sine, which no rule of torch has."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x.cos()


class Mapped(torch.autograd.Function):
    """The same in the way that torch.vmap can map by itself, with an argument that has a default."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, power=2):
        return x**power

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x.cos(), None


class Nested(torch.autograd.Function):
    """Calls another Function, whose own derivative does not count."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return triple(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.sin()


triple, mapped, nested = Triple.apply, Mapped.apply, Nested.apply
PLAIN_APPLY = vars(torch.autograd.Function)["apply"]
APPLIES = {"bound": triple, "bound and mapped": mapped, "bound and nested": nested, "a method": Triple}


def called(function, m, x):
    return (function.apply if isinstance(function, type) else function)(x) + x


@pytest.mark.parametrize("function", APPLIES.values(), ids=APPLIES)
def test_a_function_keeps_its_derivative_however_it_is_held(function):
    model, tasks = Call(partial(called, function)).double(), batch()
    _, found = gradient(model, tasks)
    torch.testing.assert_close(found, unrolled(model, tasks), rtol=1e-9, atol=1e-11)


def raising(m, x):
    triple(x)
    raise KeyError("of the user's")


def test_functions_are_torch_s_own_again_after_a_recording_and_after_an_error():
    for function in (partial(called, triple), raising):
        try:
            record(Call(function).double(), torch.randn(5, 4, dtype=torch.float64))
        except ValueError:
            assert function is raising
        assert vars(torch.autograd.Function)["apply"] is PLAIN_APPLY
        assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)


def test_a_mapped_function_is_refused_as_torch_func():
    with pytest.raises(mf.CaptureError, match=r"uses torch\.func at .*Write out"):
        record(Call(lambda m, x: torch.vmap(mapped)(x)), torch.randn(5, 4))


def recording_inside(m, x):
    record(m.first, x.detach())
    return x


def test_a_recording_inside_of_a_recording_is_an_error_in_words():
    with pytest.raises(ValueError, match="Call fails at"):
        record(Call(recording_inside), torch.randn(5, 4))
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)


class Failing(nn.Module):
    """Replaces a parameter or its data, and fails."""

    def __init__(self, change):
        super().__init__()
        self.first, self.change = nn.Linear(4, 4), change

    def forward(self, x):
        self.change(self.first)
        raise RuntimeError("after the change")


def new_data(layer):
    layer.weight.data = layer.weight.data * 2


def turned_data(layer):
    layer.bias.data = layer.bias.data[:2]


def new_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def one_more_parameter(layer):
    layer.extra = nn.Parameter(torch.zeros(3))


def interrupted(layer):
    new_data(layer)
    raise KeyboardInterrupt


CHANGES = (new_data, turned_data, new_parameter, one_more_parameter, interrupted)


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_are_put_back_after_an_error(change):
    model = Failing(change)
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises((ValueError, KeyboardInterrupt)):
        record(model, torch.randn(5, 4))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, place, value) in before.items():
        assert after[name] is parameter
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("change", [new_data, turned_data])
def test_replaced_data_is_refused_by_name_and_put_back(change):
    model = Call(lambda m, x: (change(m.first), x[:, :2])[1])
    place = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(mf.CaptureError, match=r"replaces the \.data of its parameter 'first\.(weight|bias)'"):
        record(model, torch.randn(5, 4))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == place


@pytest.mark.parametrize("mode", [True, False])
def test_the_gradient_mode_does_not_stay_behind_where_a_module_cannot_be_entered(mode, monkeypatch):
    learner = mf.MAML(nn.Linear(4, 4), loss="mse", lr=0.1)
    monkeypatch.setattr(type(learner.captures), "modes", lambda self: 1 / 0)
    with torch.set_grad_enabled(mode):
        with pytest.raises(ZeroDivisionError):
            run_module(learner.captures, torch.randn(5, 4), None)
        assert torch.is_grad_enabled() == mode


def test_parameters_that_forward_ties_are_the_module_s_own_again():
    def tie(m, x):
        m.second.weight = m.first.weight
        return m.second(x)

    model = Call(tie, second=nn.Linear(4, 4))
    own = model.second.weight
    record(model, torch.randn(5, 4))
    assert model.second.weight is own


def diamond(count, m, x):
    scale = m.scale
    for _ in range(count):
        scale = scale + scale * 0.5
    return x * 2 if scale.sum() > 0 else x


def test_a_number_made_of_constants_is_traced_back_once():
    model = Call(partial(diamond, 40))
    model.register_buffer("scale", torch.ones(1))
    start = time.perf_counter()
    recording = record(model, torch.randn(5, 4))
    assert time.perf_counter() - start < 5
    assert [tensor is model.scale for tensor in recording.guards].count(True) == 1


def chained(count, m, x):
    for _ in range(count):
        x = torch.sin(x) + 0.1
    return x


def test_three_thousand_operations_in_a_chain_become_a_program():
    model, tasks = Call(partial(chained, 1500)).double(), batch()
    start = time.perf_counter()
    _, found = gradient(model, tasks)
    assert time.perf_counter() - start < 60
    torch.testing.assert_close(found, unrolled(model, tasks), rtol=1e-9, atol=1e-11)


def beside(work):
    """Runs ``work`` again and again in another thread, and returns what stops that."""
    done, failed = threading.Event(), []

    def run():
        try:
            while not done.is_set():
                work()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def stop():
        done.set()
        thread.join()
        assert not failed

    return stop


def test_modules_that_other_threads_run_are_no_part_of_a_recording():
    """Another thread enters a module before this one does, and leaves it while this one is inside of its own."""
    entered, leave = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x):
            entered.set()
            leave.wait(10)
            return x

    class Act(nn.Module):
        def forward(self, x):
            leave.set()
            other.join()
            return torch.tanh(x)

    def step(m, x):
        other.start()
        assert entered.wait(10)
        return torch.sin(m.act(x))

    other = threading.Thread(target=Waiting(), args=(torch.ones(2),))
    recording = record(Call(step, act=Act()), torch.randn(5, 4))
    found = [(o.name, o.path, o.leaf) for o in recording.operations]
    assert found == [("linear", "first", "Linear"), ("tanh", "act", "Act"), ("sin", "", "")]


def test_functions_that_other_threads_call_are_no_part_of_a_recording():
    x, seen = torch.ones(2, requires_grad=True), []

    def work():
        (g,) = torch.autograd.grad(triple(x).sum(), x)
        seen.append(float(g[0]))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    stop = beside(work)
    try:
        for _ in range(20):
            recording = record(Call(partial(called, triple)), torch.randn(5, 4))
            assert [o.name for o in recording.operations] == ["linear", "Triple", "add"]
    finally:
        stop()
        sys.setswitchinterval(interval)
    assert seen
    assert set(seen) == {seen[0]}


def test_two_threads_record_functions_of_their_own():
    found = []

    def work(function):
        for _ in range(5):
            model, tasks = Call(partial(called, function)).double(), batch()
            found.append((gradient(model, tasks)[1], unrolled(model, tasks)))

    threads = [threading.Thread(target=work, args=(function,)) for function in (triple, nested)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 10
    for one, other in found:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_other_threads_do_not_draw_the_same_numbers_in_each_recording():
    seen = []

    def step(m, x):
        thread = threading.Thread(target=lambda: seen.append(float(torch.rand(()))))
        thread.start()
        thread.join()
        return F.dropout(x, 0.5)

    model, x = Call(step), torch.randn(5, 4)
    before = torch.get_rng_state()
    for _ in range(5):
        record(model, x)
    assert len(set(seen)) == 5
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_the_generator_is_as_before_after_an_error(error):
    def fail(m, x):
        torch.manual_seed(3)
        raise error

    model, x = Call(fail), torch.randn(5, 4)
    before = torch.get_rng_state()
    with pytest.raises((ValueError, KeyboardInterrupt)):
        record(model, x)
    assert torch.equal(before, torch.get_rng_state())


class Pair(NamedTuple):
    scale: torch.Tensor
    options: dict


class Options(torch.autograd.Function):
    """Takes tensors in nested arguments, and changes the containers."""

    @staticmethod
    def forward(ctx, x, options):
        ctx.scale = options.pop("scales")[0] * options["pair"].scale * options["pair"].options["factor"]
        ctx.save_for_backward(x)
        return x * x * ctx.scale

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x * ctx.scale, None


def with_options(m, x):
    pair = Pair(m.scale + 1, {"factor": 0.5, "scale": [m.scale]})
    return Options.apply(x, {"scales": [m.scale.sin(), (x.detach().mean(),)], "pair": pair})


def test_tensors_in_nested_arguments_of_a_function_are_looked_at_again():
    model, tasks = Call(with_options).double(), batch()
    model.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    learner, found = gradient(model, tasks)
    torch.testing.assert_close(found, unrolled(model, tasks), rtol=1e-9, atol=1e-11)
    model.scale.mul_(2)
    learner.zero_grad()
    learner.backward(tasks)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, unrolled(model, tasks), rtol=1e-9, atol=1e-11)


class Counted(nn.Module):
    """Does not do twice the same behind a batch norm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.first(x)) * next(CALLS)


CALLS = itertools.count(1)


def test_a_difference_behind_a_norm_with_a_row_for_each_step_is_named():
    learner = mf.MAML(Counted(), loss="mse", lr=0.1, bn="per_step", steps=2)
    with pytest.raises(Difference, match=r"its outputs differ by .* first at .*next\(CALLS\)"):
        learner.backward(batch(dtype=torch.float32))
