"""A residual in autograd: derivatives of two orders, what is kept for them, whose memory a gradient is, errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bnext
from bnext.functional import batch_norm
from cases import (
    ACTIVE,
    BFLOAT16_WITH_FLOAT32,
    EVAL,
    FLOAT32,
    FLOAT64,
    KEPT_LAYOUTS,
    LAYOUT,
    RESIDUAL_KINDS,
    SHAPE_OF_RANK,
    TRAIN,
    Active,
    Dtypes,
    Layout,
    Mode,
)
from composed import torchs_composition
from problem import Problem, joined, make_active

every_active = pytest.mark.parametrize("active", [None, *ACTIVE], ids=str)
every_kind = pytest.mark.parametrize("active", RESIDUAL_KINDS, ids=str)
train_and_eval = pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)


@every_active
@train_and_eval
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_derivatives(layout: str, mode: Mode, active: Active | None, device: str) -> None:
    """First and second order against differences, as in test_activation."""
    problem = joined(active, (2, 2, 3, 1), layout, FLOAT64, mode, device=device)
    assert all(np.abs(problem.affine[0] - kink).min() > 1e-3 for kink in (-3, 0, 3, 6))
    leaves = problem.require_grad()
    problem.momentum = 0.0
    assert torch.autograd.gradcheck(lambda *_: problem.forward(), leaves)
    assert torch.autograd.gradgradcheck(lambda *_: problem.forward(), leaves)


@every_active
@train_and_eval
def test_two_orders_as_torchs_composition(mode: Mode, active: Active | None, device: str) -> None:
    """Of losses on the output and all first gradients together."""
    results = []
    for function in (lambda p, _: p.forward(), torchs_composition):
        problem = joined(active, (3, 4, 3, 2), "nhwc", FLOAT64, mode, device=device)
        leaves = problem.require_grad()
        grads = [function(problem, active)]
        for _ in range(2):
            weights = [torch.linspace(-1, 2, g.numel(), device=device).view(g.shape) for g in grads]
            loss = torch.stack([(g * w).sin().sum() for g, w in zip(grads, weights, strict=True)]).sum()
            grads = list(torch.autograd.grad(loss, leaves, create_graph=True))
            results.append(grads)
    for ours, expected in zip(results[:2], results[2:], strict=True):
        largest = max(float(tensor.detach().abs().max()) for tensor in expected)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12 * largest)


# Bring x back in another memory order than it had.
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.detach().contiguous(),  # as torch.autograd.graph.save_on_cpu(pin_memory=True)
    "channels last": lambda t: (
        t.detach().contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.detach()
    ),
    "clones": lambda t: t.detach().clone(),
}


@pytest.mark.parametrize("pack", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "a slice"])
@train_and_eval
@every_active
def test_hooks_that_keep_values_in_another_order(
    active: Active | None, mode: Mode, layout: str, pack: Callable[[Tensor], Tensor], device: str
) -> None:
    """The bits of a mask lie in the order that x had."""
    results = []
    for hooked in (False, True):
        problem = joined(
            active, (3, 4, 6, 6), "nhwc" if layout == "a slice" else layout, FLOAT64, mode, device=device
        )
        if layout == "a slice":  # of which a clone is dense in an order that kernels know
            problem.x, problem.residual, problem.dy = (
                torch.cat([t, t], 3).to(memory_format=torch.channels_last)[..., ::2]
                for t in (problem.x, problem.residual, problem.dy)
            )
        leaves = problem.require_grad()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks if hooked else contextlib.nullcontext():
            y = problem.forward()
            first = torch.autograd.grad(y, leaves, problem.dy, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        results.append([y, *first, *second])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def kept_by(problem: Problem) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        problem.forward()
    return kept


@every_active
@train_and_eval
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("layout", KEPT_LAYOUTS, ids=str)
def test_what_is_kept(layout: Layout, dtypes: Dtypes, mode: Mode, active: Active | None, device: str) -> None:
    """x, and beside vectors one bit per element, or the residual, or nothing."""
    shape = SHAPE_OF_RANK[layout.rank]
    problem = joined(active, shape, layout.name, dtypes, mode, device=device)
    assert problem.residual is not None
    problem.require_grad()
    kept = kept_by(problem)
    numel, whole = problem.x.numel(), [t for t in kept if t.numel() == problem.x.numel()]
    given = [problem.x]
    if active is not None and active.activation not in ("relu", "leaky_relu", "relu6"):
        given.append(problem.residual)
    assert [t.data_ptr() for t in whole] == [t.data_ptr() for t in given]
    masks = [t for t in kept if t.dtype == torch.uint8 and t.numel()]
    needs_mask = active is not None and len(given) == 1
    assert [t.numel() for t in masks] == ([numel // 32 * 4 + 8] if needs_mask else [])
    assert sum(t.numel() for t in masks) <= numel / 8 + 8
    vectors = [t for t in kept if t.numel() != numel and t.dtype != torch.uint8]
    assert sum(t.numel() * t.element_size() for t in vectors) == 32 * shape[1]


def test_without_a_residual_nothing_more_is_kept(device: str) -> None:
    for active in (None, *ACTIVE):
        problem = make_active(active, (3, 5, 4, 5), LAYOUT["nchw"], FLOAT32, TRAIN, device=device)
        problem.require_grad()
        kept = [t for t in kept_by(problem) if t.numel()]
        assert [t.data_ptr() for t in kept if t.numel() > 20] == [problem.x.data_ptr()]
        assert {t.dtype for t in kept} == {torch.float32, torch.float64}


@train_and_eval
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_without_an_activation_its_gradient_is_dy(layout: str, mode: Mode, device: str) -> None:
    """The same memory: nothing is copied."""
    problem = joined(None, SHAPE_OF_RANK[LAYOUT[layout].rank], layout, FLOAT32, mode, device=device)
    leaves = problem.require_grad()
    *_, dresidual = torch.autograd.grad(problem.forward(), leaves, problem.dy)
    assert dresidual.data_ptr() == problem.dy.data_ptr()
    assert torch.equal(dresidual, problem.dy)


@every_kind
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_gradients_are_independent(layout: str, active: Active | None, device: str) -> None:
    """Writing to one of dx and dresidual leaves the other alone."""
    problem = joined(active, SHAPE_OF_RANK[LAYOUT[layout].rank], layout, FLOAT32, TRAIN, device=device)
    leaves = problem.require_grad()
    dx, *_, dresidual = torch.autograd.grad(problem.forward(), leaves, problem.dy.clone())
    before = dresidual.clone()
    dx.fill_(7)
    assert torch.equal(dresidual, before)


@every_kind
def test_a_residual_that_is_written_to_before_backward(active: Active | None, device: str) -> None:
    """Matters to those alone who keep it: they say so."""
    problem = joined(active, (3, 5, 4, 5), "nchw", FLOAT32, TRAIN, device=device)
    problem.require_grad("x", "weight")
    y = problem.forward()
    assert problem.residual is not None
    problem.residual.fill_(7)
    if active == Active("silu"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(problem.dy)
    else:
        y.backward(problem.dy)


@every_kind
def test_expanded_residuals(active: Active | None, device: str) -> None:
    """A gradient for each row that repeats one, which autograd adds up."""
    problem = joined(active, (6, 5, 4, 5), "nchw", FLOAT64, TRAIN, device=device)
    assert problem.residual is not None
    row = problem.residual[:1].clone().requires_grad_()
    problem.residual = row.expand(problem.x.shape)
    ours, theirs = (
        torch.autograd.grad(y, row, problem.dy)
        for y in (problem.forward(), torchs_composition(problem, active))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("active", RESIDUAL_KINDS[:2], ids=str)
def test_hooks_and_nodes(active: Active, device: str) -> None:
    problem = joined(active, (3, 5, 4, 5), "nchw", FLOAT32, TRAIN, device=device)
    problem.require_grad()
    y = problem.forward()
    assert [edge is not None for edge, _ in y.grad_fn.next_functions] == [True] * 4
    y.backward(problem.dy)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(problem.dy)


ONES = torch.ones(2, 3, 4)
WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "batch": (RuntimeError, r"residual of the input's size torch.Size\(\[2, 3, 4\]\), but got", ONES[:1]),
    "one channel": (RuntimeError, "expected residual of the input's size", ONES[:, :1]),
    "one element": (RuntimeError, "expected residual of the input's size", ONES[:1, :1, :1]),
    "rank": (RuntimeError, "expected residual of the input's size", ONES[..., None]),
    "a number": (RuntimeError, "expected residual of the input's size", torch.tensor(1.0)),
    "wider": (RuntimeError, "expected residual of the input's dtype Float, but got Double", ONES.double()),
    "narrower": (
        RuntimeError,
        "expected residual of the input's dtype Float, but got BFloat16",
        ONES.bfloat16(),
    ),
    "integer": (RuntimeError, "expected residual of the input's dtype Float, but got Long", ONES.long()),
    "device": (RuntimeError, "expected residual on the input's device cpu, but got meta", ONES.to("meta")),
    "sparse": (NotImplementedError, "SparseCPU", ONES.to_sparse()),
    "array": (TypeError, "residual as a tensor or None, but got ndarray", np.ones((2, 3, 4), np.float32)),
    "float": (TypeError, "residual as a tensor or None, but got float", 1.0),
}


@pytest.mark.parametrize("active", [None, "relu", "silu"])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str, active: str | None) -> None:
    """Before anything is touched, with gradients and without, by the function and by a layer."""
    error, text, residual = WRONG[case]
    layer = bnext.BatchNorm1d(3, activation=active)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(2, 3, 4)
    calls: list[Callable[[], object]] = [
        lambda: layer(x, residual),
        lambda: layer.requires_grad_(False)(x, residual),
        lambda: batch_norm(
            x, layer.running_mean, layer.running_var, training=True, activation=active, residual=residual
        ),
    ]
    for call in calls:
        with pytest.raises(error, match=text):
            call()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
