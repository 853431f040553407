"""Forward-mode derivatives: alone, and around and inside backward, against the function in torch's operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp, vjp

import bnext
from bnext.functional import batch_norm
from cases import ACTIVE, LAYOUT, Active
from composed import Form, close
from tolerances import unit

EVERY = [None, *ACTIVE]
NAMES = ("x", "weight", "bias", "residual")
Function = Callable[..., Any]


def tensors(layout: str, residual: bool, device: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = {"nc": (7, 4), "nchw": (3, 4, 2, 3), "nhwc": (3, 4, 2, 3)}[layout]
    shapes = [shape, (4,), (4,)] + [shape] * residual
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [LAYOUT[layout].arrange(t.to(device, dtype)) if t.dim() > 1 else t.to(device, dtype) for t in made]


def form(active: Active | None, training: bool, device: str, dtype: torch.dtype = torch.float64) -> Form:
    mean, var = torch.tensor([0.5, -1, 0.2, 2]), torch.tensor([0.5, 1, 2, 0.3])
    return Form(active, None if training else (mean.to(device, dtype), var.to(device, dtype)))


def over_and_over(function: Function, given: list[Tensor]) -> dict[str, Any]:
    """Every way of two derivatives, and one of three. Cotangents are made of x's values, which do not matter."""
    along = tuple(t.sin() for t in given)
    x = given[0].detach()
    pulled = lambda f: lambda *a: vjp(f, *a)[1](x.cos())  # noqa: E731
    pushed = lambda f: lambda *a: jvp(f, a, along)[1]  # noqa: E731
    return {
        "jvp": jvp(function, tuple(given), along),
        "jvp of vjp": jvp(pulled(function), tuple(given), along),
        "vjp of jvp": pulled(pushed(function))(*given),
        "jvp of jvp": pushed(pushed(function))(*given),
        "jvp of vjp of vjp": jvp(
            lambda *a: vjp(pulled(function), *a)[1](tuple(t.cos() for t in along)), tuple(given), along
        ),
    }


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("active", EVERY, ids=str)
def test_func(active: Active | None, residual: bool, training: bool, layout: str, device: str) -> None:
    given, called = tensors(layout, residual, device), form(active, training, device)
    close(over_and_over(called.ours, given), over_and_over(called.composed, given))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("active", EVERY, ids=str)
def test_dual_tensors_in_backward(active: Active | None, residual: bool, training: bool, device: str) -> None:
    """Gradients have tangents, of every leaf that has one and of dy; without torch.func leaves are the same tensors."""
    called = form(active, training, device)

    def tangents(function: Function, position: int) -> list[Any]:
        leaves = [t.requires_grad_() for t in tensors("nchw", residual, device)]
        with forward_ad.dual_level():
            duals = list(leaves)
            duals[position] = forward_ad.make_dual(leaves[position], leaves[position].detach().cos())
            dy = forward_ad.make_dual(leaves[0].detach().sin(), leaves[0].detach())
            y = function(*duals)
            grads = torch.autograd.grad(y, duals, dy)
            return [forward_ad.unpack_dual(t) for t in (y, *grads)]

    for position in range(3 + residual):
        ours, expected = tangents(called.ours, position), tangents(called.composed, position)
        for one, other in zip(ours, expected, strict=True):
            close(one.primal, other.primal)
            close(one.tangent, other.tangent)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("active", [None, Active("gelu")], ids=str)
def test_gradcheck(active: Active | None, training: bool, device: str) -> None:
    """By differences, with tangents one by one and in a batch; of first order and of forward over reverse."""
    given = tuple(t.requires_grad_() for t in tensors("nc", True, device))
    function = form(active, training, device).ours
    assert torch.autograd.gradcheck(
        function, given, check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(function, given, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16", "bf16_f32"])
@pytest.mark.parametrize("active", [None, Active("silu")], ids=str)
def test_dtypes(active: Active | None, dtypes: str, device: str) -> None:
    """A tangent is a sum of what x, weight and bias (one call) and the residual bring, each a call's result.

    Every part is stored once, as are the sum and what the activation makes of it; four roundings of parts. What
    arithmetic adds is that of a backward, a few dozen roundings of terms up to the channel's largest.
    """
    known = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    dtype = known[dtypes.split("_")[0]]
    given = tensors("nhwc", True, device, dtype)
    if dtypes == "bf16_f32":
        given[1:3] = [t.float() for t in given[1:3]]
    along = tuple(t.sin() for t in given)
    wide, wide_along = ([t.double() for t in ts] for ts in (given, along))
    y, tangent = jvp(form(active, True, device, dtype).ours, tuple(given), along)
    assert y.dtype == tangent.dtype == dtype
    exact = form(active, True, device)
    assert torch.equal(y, exact.ours(*wide).to(dtype)) or dtype is torch.float32

    def part(*names: str) -> Tensor:
        only = tuple(
            t if name in names else torch.zeros_like(t) for t, name in zip(wide_along, NAMES, strict=True)
        )
        pushed: Tensor = jvp(exact.composed, tuple(wide), only)[1]
        return pushed

    parts = [part("x"), part("weight", "bias"), part("residual")]
    size = sum(p.abs() for p in parts)
    largest = size.amax((0, 2, 3), keepdim=True)
    bound = 4 * unit(dtype) * size + 48 * unit(torch.float32) * largest
    assert ((tangent.double() - sum(parts)).abs() <= bound).all()


def test_running_statistics_move_once(device: str) -> None:
    """A layer with tangents is a layer: outputs, statistics and the counter are those without."""
    results = []
    for with_tangent in (False, True):
        layer = bnext.BatchNorm2d(4, device=device, dtype=torch.float64)
        x = tensors("nchw", False, device)[0]
        y = jvp(layer, (x,), (x.cos(),))[0] if with_tangent else layer(x)
        results.append((y.detach(), *layer.buffers()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_weights_may_change_before_backward(device: str) -> None:
    """Backward has the weight of the forward pass, and its tangent."""
    x, weight, bias = tensors("nc", False, device)
    results = []
    for changed in (False, True):
        with forward_ad.dual_level():
            leaf = x.clone().requires_grad_()
            primal = weight.clone()
            dual = forward_ad.make_dual(primal, weight.cos())
            y = batch_norm(leaf, None, None, dual, bias, training=True)
            if changed:
                primal.fill_(7)
            (dx,) = torch.autograd.grad(y, leaf, x.sin())
            results.append(forward_ad.unpack_dual(dx))
    assert torch.equal(results[0].primal, results[1].primal)
    assert torch.equal(results[0].tangent, results[1].tangent)


def test_a_network(device: str) -> None:
    """A Hessian-vector product through layers, forward over reverse, in a converted network and in torch's own."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2), nn.BatchNorm1d(2)
    ).to(device, torch.float64)
    x = torch.randn(5, 3, 6, 6, device=device, dtype=torch.float64)
    products = []
    for model in (network, bnext.convert(network)):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def loss(p: dict[str, Tensor], model: nn.Module = model, b: Any = buffers) -> Tensor:
            y: Tensor = torch.func.functional_call(model, (p, {n: t.clone() for n, t in b.items()}), (x,))
            return y.sin().sum()

        along = {name: p.cos() for name, p in parameters.items()}
        products.append(jvp(torch.func.grad(loss), (parameters,), (along,))[1])
    close(*products)


def test_large_input(device: str) -> None:
    """Squares that are none in float32 are taken of standardised values."""
    x, *parameters = tensors("nc", False, device, torch.float32)
    along = tuple(t.cos() for t in parameters)
    found = []
    for scale in (1.0, 1e25):
        large = x * scale

        def function(*given: Tensor, x: Tensor = large) -> Tensor:
            return form(None, True, device).ours(x, *given)

        found.append(jvp(function, tuple(parameters), along))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)  # but for eps


def test_inplace_refuses(device: str) -> None:
    """Its tangent would be written over that of x; what is dropped in silence would be a wrong zero."""
    x, weight, bias = tensors("nc", False, device)
    for position in range(3):
        with forward_ad.dual_level():
            duals = [x.clone(), weight, bias]
            duals[position] = forward_ad.make_dual(duals[position], torch.ones_like(duals[position]))
            with pytest.raises(NotImplementedError, match="forward AD with bnext::batch_norm_ "):
                batch_norm(duals[0], None, None, *duals[1:], training=True, inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_tangent_of_one_parameter_alone(which: str, dtype: torch.dtype, device: str) -> None:
    """Backward has the one as it was, the other from the statistics."""
    results = []
    for kind in (bnext.BatchNorm2d(3, activation="relu"), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())):
        network = copy.deepcopy(kind).to(device, dtype)
        layer = network[0] if isinstance(network, nn.Sequential) else network
        generator = torch.Generator(device).manual_seed(1)
        x = torch.randn(4, 3, 5, 6, device=device, generator=generator).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 1.5, 3))
            layer.bias.copy_(torch.linspace(-0.5, 0.5, 3))
        parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
        tangent = torch.ones_like(parameters[which])
        prefix = "" if layer is network else "0."
        with forward_ad.dual_level():
            dual = {**parameters, which: forward_ad.make_dual(parameters[which], tangent)}
            y = torch.func.functional_call(network, {prefix + name: p for name, p in dual.items()}, (x,))
            grads = torch.autograd.grad(y.float().square().mean(), [*parameters.values()])
            results.append([forward_ad.unpack_dual(t) for t in (y, *grads)])
    eps = 40 * torch.finfo(dtype).eps
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.primal, expected.primal, rtol=eps, atol=eps)
        torch.testing.assert_close(ours.tangent, expected.tangent, rtol=eps, atol=eps)
