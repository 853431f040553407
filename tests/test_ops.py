"""The operators themselves: opcheck, derivatives of first and second order, meta kernels, schemas, bad arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from bnext.functional import batch_norm
from cases import (
    BFLOAT16_WITH_FLOAT32,
    BOTH,
    FLOAT32,
    FLOAT64,
    LAYOUT,
    LAYOUTS,
    MODES,
    PARAMETERS,
    SHAPE_OF_RANK,
    TRAIN,
    Dtypes,
    Layout,
    Mode,
)
from composed import elementary
from operators import BACKWARD, FORWARD, INPLACE, NO_UPDATE, backward_arguments, forward_arguments
from problem import Problem, make

OPCHECK_CASES = [
    ("nc", FLOAT32, "train", BOTH),
    ("nchw", FLOAT32, "eval", BOTH),
    ("nhwc", FLOAT32, "train", ("weight",)),
    ("ndhwc", FLOAT64, "untracked", ()),
    ("hwnc", FLOAT32, "train", ("bias",)),
    ("ncdhw", BFLOAT16_WITH_FLOAT32, "train", BOTH),
]
MODE = {mode.name: mode for mode in MODES}


@pytest.mark.parametrize(("layout", "dtypes", "mode", "parameters"), OPCHECK_CASES, ids=str)
def test_opcheck(layout: str, dtypes: Dtypes, mode: str, parameters: tuple[str, ...], device: str) -> None:
    """Schema (nothing else is written or aliased), autograd registration, fake tensors, and AOT with dynamic shapes."""
    problem = make(
        SHAPE_OF_RANK[LAYOUT[layout].rank], LAYOUT[layout], dtypes, MODE[mode], parameters, device=device
    )
    opcheck(BACKWARD, backward_arguments(problem))
    problem.require_grad()
    opcheck(FORWARD, forward_arguments(problem))
    opcheck(FORWARD, forward_arguments(problem, momentum=None))


def assert_derivatives_hold(problem: Problem, *wanted: str) -> None:
    """First and second order against differences. Momentum 0, because the differences call it again and again."""
    leaves = problem.require_grad(*wanted)
    problem.momentum = 0.0
    assert torch.autograd.gradcheck(lambda *_: problem.forward(), leaves)
    assert torch.autograd.gradgradcheck(lambda *_: problem.forward(), leaves)


SMALL = {2: (3, 2), 3: (2, 2, 2), 4: (2, 2, 2, 1), 5: (2, 2, 1, 2, 1)}


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda names: "+".join(names) or "plain")
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_derivatives(layout: Layout, mode: Mode, parameters: tuple[str, ...], device: str) -> None:
    problem = make(SMALL[layout.rank], layout, FLOAT64, mode, parameters, device=device)
    if "expanded" in layout.name:
        problem.x = problem.x.contiguous()  # differences move one element at a time
    assert_derivatives_hold(problem)


@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias")], ids="+".join
)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_derivatives_for_subsets(layout: str, mode: Mode, wanted: tuple[str, ...], device: str) -> None:
    problem = make(SMALL[LAYOUT[layout].rank], LAYOUT[layout], FLOAT64, mode, device=device)
    assert_derivatives_hold(problem, *wanted)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_three_orders_at_once(layout: str, mode: Mode, device: str) -> None:
    """Losses on gradients of x, weight and bias together."""
    results = []
    for function in (Problem.forward, elementary):
        problem = make((3, 4, 3, 2), LAYOUT[layout], FLOAT64, mode, device=device)
        leaves = problem.require_grad()
        random = torch.Generator().manual_seed(9)
        grads = [function(problem).tanh()]
        for _ in range(3):
            weights = [torch.randn(g.shape, generator=random, dtype=g.dtype).to(device) for g in grads]
            loss = torch.stack([(g * w).tanh().sum() for g, w in zip(grads, weights, strict=True)]).sum()
            grads = list(torch.autograd.grad(loss, leaves, create_graph=True))
            results.append(grads)
    # tanh keeps every loss near one; a few hundred roundings.
    for ours, expected in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_meta_kernels_tell_what_will_come(layout: Layout, dtypes: Dtypes, device: str) -> None:
    problem = make(SHAPE_OF_RANK[layout.rank], layout, dtypes, TRAIN, device=device)
    for op, arguments in (
        (FORWARD, forward_arguments(problem)),
        (BACKWARD, backward_arguments(problem)),
        (BACKWARD, backward_arguments(problem, (False, True, False))),
    ):
        on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        for told, came in zip(op(*on_meta), op(*arguments), strict=True):
            assert told.device.type == "meta"
            assert (told.shape, told.stride(), told.dtype) == (came.shape, came.stride(), came.dtype)


@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_statistics_returned(layout: str, device: str) -> None:
    """(2, C) in float64: the mean and 1 / sqrt(var + eps) that y was normalised with."""
    for mode in MODES:
        problem = make(SHAPE_OF_RANK[LAYOUT[layout].rank], LAYOUT[layout], FLOAT64, mode, device=device)
        _, stats, _ = FORWARD(*forward_arguments(problem))
        mean, var = (torch.from_numpy(values).to(device) for values in problem.statistics)
        torch.testing.assert_close(
            stats, torch.stack((mean, (var + problem.eps).rsqrt())), rtol=1e-13, atol=1e-14
        )


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_output_mask(mode: Mode, wanted: tuple[bool, ...], device: str) -> None:
    problem = make((3, 5, 4, 5), LAYOUT["nchw"], BFLOAT16_WITH_FLOAT32, mode, device=device)
    results = BACKWARD(*backward_arguments(problem, wanted))
    everything = BACKWARD(*backward_arguments(problem))
    for want, result, full in zip((*wanted, False), results, everything, strict=True):
        assert torch.equal(result, full) if want else result.numel() == 0
    assert everything[1].dtype == everything[2].dtype == torch.float32


def test_schemas() -> None:
    """What is written is declared, so that functionalisation and schedulers know."""
    written = [argument.name for argument in FORWARD._schema.arguments if argument.is_write]
    assert written == ["running_mean", "running_var", "num_batches_tracked"]
    assert not any(argument.is_write for argument in BACKWARD._schema.arguments)
    over = [argument.name for argument in INPLACE._schema.arguments if argument.is_write]
    assert over == ["x", *written]
    for op in (FORWARD, NO_UPDATE, INPLACE, BACKWARD):
        assert torch.Tag.pt2_compliant_tag in op.tags


def test_version_counters(device: str) -> None:
    """A write to a running buffer is one that autograd can see: who saved it before is told."""
    problem = make((4, 3), LAYOUT["nc"], FLOAT32, TRAIN, device=device)
    assert problem.running_mean is not None
    factor = torch.ones(3, device=device, requires_grad=True)
    product = problem.running_mean * factor
    problem.forward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_views_with_a_hidden_sign(device: str) -> None:
    """The imaginary part of a conjugate is a real view that still has to be negated."""
    x = torch.complex(torch.randn(4, 3), torch.randn(4, 3)).to(device).conj().imag
    assert x.is_neg()
    assert torch.equal(
        batch_norm(x, None, None, training=True), batch_norm(x.clone(), None, None, training=True)
    )


def test_matrices_of_parameters(device: str) -> None:
    """Weight and bias count by elements, as in torch: any shape will do, and the gradient has it."""
    x = torch.randn(5, 4, device=device)
    flat = [torch.randn(4, device=device, requires_grad=True) for _ in range(2)]
    square = [tensor.detach().view(2, 2).requires_grad_() for tensor in flat]
    for weight, bias in (flat, square):
        batch_norm(x, None, None, weight, bias, training=True).square().sum().backward()
    for one, other in zip(flat, square, strict=True):
        assert torch.equal(one.grad.view(2, 2), other.grad)


X, STATS = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)


def backward(
    dy: Tensor = X,
    x: Tensor = X,
    weight: Any = None,
    stats: Tensor = STATS,
    wanted: Any = (True, True, True, False),
) -> Any:
    return BACKWARD(dy, x, None, None, weight, None, stats, True, None, None, False, wanted)


# Called by hand, the operators get anything; there is no module before them.
BAD_CALLS: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "stats, one row": (RuntimeError, "expected stats of size", lambda: backward(stats=STATS[:1])),
    "stats, flat": (RuntimeError, "expected stats of size", lambda: backward(stats=STATS.view(-1))),
    "stats, channels": (
        RuntimeError,
        "expected stats of size",
        lambda: backward(stats=torch.ones(2, 4).double()),
    ),
    "stats, dtype": (RuntimeError, "expected stats of dtype Double", lambda: backward(stats=STATS.float())),
    "stats, device": (RuntimeError, "expected stats on", lambda: backward(stats=STATS.to("meta"))),
    "dy, size": (RuntimeError, "expected dy of the input's size", lambda: backward(X[:1])),
    "dy, rank": (RuntimeError, "expected dy of the input's size", lambda: backward(X[..., None])),
    "dy, dtype": (RuntimeError, "expected dy of the input's dtype", lambda: backward(X.double())),
    "dy, device": (RuntimeError, "expected dy on", lambda: backward(X.to("meta"))),
    "weight": (
        RuntimeError,
        "weight should contain 3 elements not 2",
        lambda: backward(weight=torch.ones(2)),
    ),
    "weight, dtype": (
        RuntimeError,
        "expected weight to have dtype Float or Double beside",
        lambda: backward(weight=torch.ones(3).half()),
    ),
    "x, 1D": (ValueError, "at least 2D", lambda: backward(X[0], X[0])),
    "x, no channel": (
        ValueError,
        "at least one channel",
        lambda: backward(X[:, :0], X[:, :0], stats=STATS[:, :0]),
    ),
    "x, integer": (NotImplementedError, "not implemented for 'Long'", lambda: backward(X.long(), X.long())),
    "output_mask": (RuntimeError, "size 4", lambda: backward(wanted=[True, True])),
    "ranks": (
        ValueError,
        r"expected 4D input \(got 2D",
        lambda: FORWARD(X, *[None] * 6, True, 0.1, 1e-5, True, [4], None, None, False),
    ),
    "few arguments": (RuntimeError, "missing value for argument 'residual'", lambda: FORWARD(X)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    error, text, call = BAD_CALLS[case]
    with pytest.raises(error, match=text):
        call()
