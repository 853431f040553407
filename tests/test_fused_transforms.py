"""A residual and a write over the input under torch.func, tracers and hooks, and with gradients in any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import bnext
from bnext.functional import batch_norm
from cases import FLOAT32, FLOAT64, LAYOUT, TRAIN, Active, arguments_of
from operators import FORWARD, INPLACE
from problem import Problem, make_active

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# With a residual: by a mask, by itself, by nothing; over the input: one of each that can be inverted.
RESIDUAL = [(active, False) for active in (Active("leaky_relu"), Active("silu"), None)]
OVER = [(active, True) for active in (Active("leaky_relu"), Active("elu"), None)]
every_form = pytest.mark.parametrize(("active", "inplace"), RESIDUAL + OVER, ids=str)


def make(active: Active | None, inplace: bool, layout: str = "nhwc", device: str = "cpu") -> Problem:
    residual = None if inplace else LAYOUT[layout]
    shape, dtypes = (3, 5, 4, 5), FLOAT64
    return make_active(
        active, shape, LAYOUT[layout], dtypes, TRAIN, device=device, residual=residual, inplace=inplace
    )


def layer_of(active: Active | None, inplace: bool) -> bnext.BatchNorm2d:
    given = arguments_of(active)
    return bnext.BatchNorm2d(5, activation=given[0], activation_param=given[1], inplace=inplace)


def call(layer: Any, x: Tensor, inplace: bool) -> Tensor:
    return layer(x * 2) if inplace else layer(x * 2, x)


@every_form
def test_dynamic_batch(active: Active | None, inplace: bool) -> None:
    """One graph for every batch size, the mask's among them."""
    counter = CompileCounterWithBackend("aot_eager")
    eager, layer = layer_of(active, inplace), layer_of(active, inplace)
    compiled = torch.compile(lambda x: call(layer, x, inplace), fullgraph=True, backend=counter)
    for batch in (8, 9, 10):
        results = []
        for function in (compiled, lambda x: call(eager, x, inplace)):
            x = torch.linspace(-3, 3, batch * 210).sin().view(batch, 5, 6, 7).requires_grad_()
            torch._dynamo.mark_dynamic(x, 0)
            y = function(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count == 1


@every_form
def test_func_grad(active: Active | None, inplace: bool, device: str) -> None:
    problem = make(active, inplace, device=device)
    given = arguments_of(active)

    def loss(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x * 1
        options = {"residual": residual, "inplace": inplace}
        y = batch_norm(
            x, None, None, weight, bias, True, activation=given[0], activation_param=given[1], **options
        )
        return y.sin().sum()

    tensors = [t for t in (problem.x, problem.weight, problem.bias, problem.residual) if t is not None]
    ours = torch.func.grad(loss, tuple(range(len(tensors))))(*tensors)
    leaves = problem.require_grad()
    theirs = torch.autograd.grad(problem.forward().sin().sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@every_form
def test_tracers_record_the_operator(active: Active | None, inplace: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer_of(active, inplace)

        def forward(self, x: Tensor) -> Tensor:
            return call(self.layer, x, inplace)

    model, x = Model().eval(), torch.linspace(-2, 3, 420).view(2, 5, 6, 7)
    traced, made = torch.jit.trace(model, x), make_fx(model)(x)
    assert ("bnext::batch_norm_(" if inplace else "bnext::batch_norm(") in str(traced.inlined_graph)
    assert (INPLACE if inplace else FORWARD) in [node.target for node in made.graph.nodes]
    for other in (traced, made):
        assert torch.equal(other(x.cos()), model(x.cos()))


@every_form
def test_saved_tensor_hooks(active: Active | None, inplace: bool, device: str) -> None:
    """What is packed comes back: y too, which is the node's own output."""
    problem = make(active, inplace, device=device)
    leaves = problem.require_grad()
    expected = torch.autograd.grad(problem.forward(), leaves, problem.dy)
    with torch.autograd.graph.save_on_cpu():
        y = problem.forward()
    for again in (True, False):
        grads = torch.autograd.grad(y, leaves, problem.dy, retain_graph=again)
        for one, other in zip(grads, expected, strict=True):
            assert torch.equal(one, other)


@every_form
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_gradients_that_lie_otherwise(layout: str, active: Active | None, inplace: bool, device: str) -> None:
    """A dy of any strides gives the bits of one that lies like x; dx and dresidual lie like x themselves."""
    problem = make(active, inplace, layout, device)
    leaves = problem.require_grad()
    for name in ("nchw", "nhwc", "hwnc", "nchw_sliced_width", "nchw_expanded_channels"):
        dy = LAYOUT[name].arrange(problem.dy)
        plain = LAYOUT[layout].arrange(dy.contiguous())
        results = [torch.autograd.grad(problem.forward(), leaves, g) for g in (dy, plain)]
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
        assert results[0][0].stride() == problem.x.stride()
        if active is not None and not inplace:
            assert results[0][3].stride() == problem.x.stride()


def test_views_with_a_hidden_sign(device: str) -> None:
    """The imaginary part of a conjugate: added as it is, and not written over."""
    x, hidden = torch.randn(4, 3, device=device), torch.randn(4, 3, dtype=torch.complex64, device=device)
    hidden = hidden.conj().imag
    assert hidden.is_neg()
    results = [batch_norm(x, None, None, training=True, residual=r) for r in (hidden, hidden.clone())]
    assert torch.equal(*results)
    mean, var, before = torch.zeros(3, device=device), torch.ones(3, device=device), hidden.clone()
    with pytest.raises(RuntimeError, match=r"expected input\.resolve_neg\(\)"):
        batch_norm(hidden, mean, var, training=True, inplace=True)
    assert torch.equal(hidden, before) and not mean.any()


def test_parallel_edges_to_one_tensor(device: str) -> None:
    """x as its own residual: both gradients arrive."""
    for active in (Active("relu"), Active("silu"), None):
        problem = make_active(active, (4, 3), LAYOUT["nc"], FLOAT32, TRAIN, device=device)
        results = []
        for same in (True, False):
            leaf = problem.x.detach().clone().requires_grad_()
            x = leaf * 1
            problem.x, problem.residual = x, x if same else leaf * 1
            results.append(torch.autograd.grad(problem.forward(), leaf, problem.dy)[0])
        assert torch.equal(*results)
