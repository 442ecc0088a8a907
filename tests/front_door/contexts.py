"""What autograd treats otherwise than its values say: no_grad, detach, checkpoints, Functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from front_door.case import CLASSES, Net, Table, small
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

CASES = Table()
over_samples = torch.vmap


@CASES.forward()
def a_layer_under_no_grad(net, x):
    with torch.no_grad():
        features = torch.tanh(net.body(x))
    return net.head(features)


@CASES.forward()
def the_mean_under_no_grad(net, x):
    h = net.body(x)
    with torch.no_grad():
        mean = h.mean(0)
    return net.head(torch.tanh(h - mean))


class DecoratedBody(Net):
    @torch.no_grad()
    def features(self, x):
        return torch.tanh(self.body(x))


@CASES.forward(base=DecoratedBody)
def no_grad_as_a_decorator(net, x):
    return net.head(net.features(x) + net.second(x))


@CASES.forward()
def set_grad_enabled_by_a_flag(net, x):
    with torch.set_grad_enabled(net.temperature > 2):
        h = torch.tanh(net.body(x))
    return net.head(h * net.second(x))


@CASES.forward()
def set_grad_enabled_as_a_function(net, x):
    torch.set_grad_enabled(False)
    h = torch.tanh(net.body(x))
    torch.set_grad_enabled(True)
    return net.head(h * net.second(x))


@CASES.forward()
def inference_mode_for_the_features(net, x):
    with torch.inference_mode():
        h = torch.tanh(net.body(x))
    return net.head(h.clone())


@CASES.forward()
def enable_grad_inside_no_grad(net, x):
    with torch.no_grad():
        frozen = torch.tanh(net.body(x))
        with torch.enable_grad():
            live = torch.tanh(net.second(x))
    return net.head(frozen + live)


@CASES.forward()
def data_of_an_activation(net, x):
    h = torch.tanh(net.body(x))
    return net.head(h - h.data.mean(0, keepdim=True))


@CASES.forward()
def data_of_a_parameter(net, x):
    return net.head(torch.tanh(net.body(x) + x @ net.second.weight.data))


@CASES.forward()
def one_half_detached(net, x):
    left, right = net.body(x).chunk(2, dim=1)
    return net.head(torch.tanh(torch.cat([left.detach(), right], dim=1)))


@CASES.forward()
def a_straight_through_estimator(net, x):
    h = net.body(x)
    hard = (h > 0).to(h.dtype)
    return net.head(h + (hard - h).detach())


@CASES.forward()
def a_detached_softmax_temperature(net, x):
    h = net.body(x)
    return net.head(h / (1 + h.detach().abs().max()))


@CASES.forward()
def a_target_network_under_no_grad(net, x):
    with torch.no_grad():
        weight = F.normalize(net.second.weight, dim=1)
    return net.head(torch.tanh(F.linear(x, weight) + net.body(x)))


class Unchecked(Net):
    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.body(x)))))


def without_checkpoint(model):
    """The truth's module: a checkpoint runs again when functional_call has put the first parameters back."""
    net = Unchecked().double()
    net.load_state_dict(model.state_dict())
    return net


@CASES.forward(plain=without_checkpoint)
def checkpoint_of_a_layer(net, x):
    return net.head(checkpoint(lambda h: torch.tanh(net.second(h)), torch.tanh(net.body(x)), use_reentrant=False))


@CASES.forward(plain=without_checkpoint)
def checkpoint_of_a_sequential(net, x):
    layers = [net.body, torch.tanh, net.second, torch.tanh]
    return net.head(checkpoint_sequential(layers, 2, x, use_reentrant=False))


# torch.autograd.grad does not go through the old form.
@CASES.forward(plain=without_checkpoint, may_be_refused=True)
def checkpoint_in_its_old_form(net, x):
    return net.head(checkpoint(lambda h: torch.tanh(net.second(h)), torch.tanh(net.body(x)), use_reentrant=True))


class Reverse(Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


@CASES.forward()
def gradient_reversal(net, x):
    return net.head(Reverse.apply(torch.tanh(net.body(x))))


reverse = Reverse.apply


@CASES.forward()
def a_function_that_is_held_by_its_apply(net, x):
    return net.head(reverse(torch.tanh(net.body(x))))


class Sign(Function):
    """A sign whose gradient is passed on where its input is small."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1)


@CASES.forward()
def a_binarised_activation(net, x):
    return net.head(Sign.apply(net.body(x)))


@CASES.forward()
def a_binarised_weight(net, x):
    return net.head(torch.tanh(F.linear(x, Sign.apply(net.body.weight), net.body.bias)))


class ScaledExp(Function):
    """Takes a number and a bool, saves its output."""

    @staticmethod
    def forward(ctx, x, scale, negate):
        y = torch.exp(x * scale)
        y = -y if negate else y
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return 3 * g * y * ctx.scale, None, None


@CASES.forward()
def a_function_of_numbers(net, x):
    return net.head(ScaledExp.apply(net.body(x), 0.3, True))


class Halves(Function):
    """Two outputs, the gradient of the second is doubled."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w, x + w

    @staticmethod
    def backward(ctx, g, h):
        x, w = ctx.saved_tensors
        return g * w + 2 * h, (g * x + 2 * h).sum(0)


@CASES.forward()
def a_function_of_two_outputs_and_a_parameter(net, x):
    a, b = Halves.apply(torch.tanh(net.body(x)), net.vector)
    return net.head(a - 0.5 * b)


@CASES.forward()
def a_function_one_output_of_which_is_unused(net, x):
    return net.head(Halves.apply(torch.tanh(net.body(x)), net.vector)[1])


class Clipped(Function):
    """The identity, with its gradient clipped in norm."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g / (1 + g.norm())


class ClippedBack(nn.Module):
    def forward(self, x):
        return Clipped.apply(x)


CASES.one(
    "a function inside a Sequential that clips its gradient",
    lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), ClippedBack(), nn.Linear(8, CLASSES)),
)


class SetUpApart(Function):
    """The newer form, with setup_context."""

    @staticmethod
    def forward(x):
        return x.sigmoid()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return 2 * g * y * (1 - y)


@CASES.forward()
def a_function_with_setup_context(net, x):
    return net.head(SetUpApart.apply(net.body(x)))


class OnceDifferentiable(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


@CASES.forward(options={"first_order": True}, truth={"first_order": True})
def a_function_that_is_once_differentiable_at_first_order(net, x):
    return net.head(OnceDifferentiable.apply(torch.tanh(net.body(x))))


# torch.autograd.grad takes what such a backward makes for a constant, and backward() refuses it.
@CASES.forward(may_be_refused=True)
def a_function_that_is_once_differentiable_at_second_order(net, x):
    return net.head(OnceDifferentiable.apply(torch.tanh(net.body(x))))


@CASES.forward(may_be_refused=True)
def a_gradient_hook_on_an_activation(net, x):
    h = torch.tanh(net.body(x))
    if h.requires_grad:
        h.register_hook(lambda g: 0.5 * g)
    return net.head(h)


@CASES.forward()
def autocast_around_a_float64_layer(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = torch.tanh(net.body(x))
    return net.head(h)


# bfloat16 has 8 bits: what matters is the factor of three that only a forward pass under autocast meets.
@CASES.forward(dtype=torch.float32, tolerance=0.1)
def autocast_around_a_layer(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = net.body(x)
    scale = 3.0 if h.dtype == torch.bfloat16 else 1.0
    return net.head(torch.tanh(scale * h.float()))


# Elementwise kernels may round a vector's tail otherwise, and float32 has 24 bits.
@CASES.forward(tolerance=1e-5)
def a_float32_island_in_a_float64_model(net, x):
    h = net.body(x).float()
    return net.head(torch.softmax(h, dim=-1).to(x.dtype))


CASES.one("a network of a learner that is used plainly", small)


@CASES.forward()
def a_branch_on_requires_grad(net, x):
    h = net.body(x)
    if h.requires_grad and torch.is_grad_enabled():
        h = torch.tanh(h)
    return net.head(h)


@CASES.forward()
def detached_and_made_a_leaf_again(net, x):
    h = torch.tanh(net.body(x)).detach()
    h.requires_grad_()
    return net.head(h * net.second(x))


@CASES.forward(refused=("contexts.py", "torch.autograd.grad("))
def a_gradient_inside_of_forward(net, x):
    h = torch.tanh(net.body(x))
    (g,) = torch.autograd.grad(h.square().sum(), h, create_graph=True)
    return net.head(h - 0.1 * g)


@CASES.forward(may_be_refused=True)
def vmap_inside_of_forward(net, x):
    return net.head(over_samples(lambda row: torch.tanh(net.body(row)))(x))


@CASES.forward(may_be_refused=True)
def functional_call_inside_of_forward(net, x):
    weight = net.body.weight * 0.5
    return net.head(torch.tanh(functional_call(net.body, {"weight": weight}, (x,))))


@CASES.forward(may_be_refused=True)
def a_value_that_is_logged(net, x):
    h = torch.tanh(net.body(x))
    net.seen = h.detach().mean().item()
    return net.head(h)
