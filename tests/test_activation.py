"""y = f(batch_norm(x)) against the float64 reference and torch's composition; derivatives; what is kept for them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import activation_tolerances
import tolerances
from bnext.functional import batch_norm
from cases import (
    ACTIVE,
    BFLOAT16_WITH_FLOAT32,
    DTYPES,
    EVAL,
    FLOAT32,
    FLOAT64,
    KEPT_LAYOUTS,
    LAYOUT,
    LAYOUTS,
    MODES,
    PARAMETERS,
    SHAPE_OF_RANK,
    TRAIN,
    Active,
    Dtypes,
    Layout,
    Mode,
)
from composed import elementary, torchs_composition
from judged import numpy
from problem import Problem, make_active

RELU, RELU6, SILU, GELU = Active("relu"), Active("relu6"), Active("silu"), Active("gelu")
every_active = pytest.mark.parametrize("active", ACTIVE, ids=str)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES, ids=str)
# Fewer elements than a vector has, and whole vectors with a remainder.
SHAPES = [
    ("nchw", (3, 5, 4, 5)),
    ("nchw", (2, 3, 17, 31)),
    ("nhwc", (3, 5, 4, 5)),
    ("nhwc", (3, 37, 5, 7)),
    ("nc", (12, 5)),
    ("nc", (65, 33)),
]
every_shape = pytest.mark.parametrize(("layout", "shape"), SHAPES, ids=str)


def check_all(problem: Problem) -> None:
    problem.require_grad()
    before = problem.x.detach().clone()
    y = problem.forward()
    problem.check_output(y)
    y.backward(problem.dy)
    problem.check_grads()
    assert torch.equal(problem.x, before), "the input was written to"


@every_active
@every_mode
@every_dtype
@every_shape
def test_against_the_reference(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active, device: str
) -> None:
    problem = make_active(active, shape, LAYOUT[layout], dtypes, mode, device=device)
    check_all(problem)
    if mode.batch and mode.tracked:
        problem.check_running(0.1)


@pytest.mark.parametrize("active", [RELU, GELU], ids=str)
@every_mode
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(layout: Layout, mode: Mode, active: Active, device: str) -> None:
    problem = make_active(active, SHAPE_OF_RANK[layout.rank], layout, FLOAT32, mode, device=device)
    check_all(problem)
    leaves = problem.require_grad()
    y = problem.forward()
    dx, *_ = torch.autograd.grad(y, leaves, problem.dy)
    for result in (y, dx):
        assert result.is_contiguous(memory_format=layout.kept)


@pytest.mark.parametrize("active", [RELU, SILU], ids=str)
@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda names: "+".join(names) or "plain")
@every_mode
@every_dtype
def test_every_parameter_set(
    dtypes: Dtypes, mode: Mode, parameters: tuple[str, ...], active: Active, device: str
) -> None:
    for layout in ("nc", "nchw", "nhwc"):
        shape = SHAPE_OF_RANK[LAYOUT[layout].rank]
        check_all(make_active(active, shape, LAYOUT[layout], dtypes, mode, parameters, device=device))


SUBSETS = [c for n in (1, 2) for c in itertools.combinations(("x", "weight", "bias"), n)]


@pytest.mark.parametrize("active", [RELU, SILU], ids=str)
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@every_mode
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_any_subset(layout: str, mode: Mode, wanted: tuple[str, ...], active: Active, device: str) -> None:
    shape = SHAPE_OF_RANK[LAYOUT[layout].rank]
    problem = make_active(active, shape, LAYOUT[layout], FLOAT32, mode, device=device)
    problem.require_grad(*wanted)
    problem.forward().backward(problem.dy)
    problem.check_grads()


@every_active
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_derivatives(layout: str, mode: Mode, active: Active, device: str) -> None:
    """First and second order against differences, as in test_ops; they must not step over a kink."""
    problem = make_active(active, (2, 3, 2, 2), LAYOUT[layout], FLOAT64, mode, device=device)
    z = problem.affine[0]
    assert all(np.abs(z - kink).min() > 1e-3 for kink in (-3, 0, 3, 6))
    leaves = problem.require_grad()
    problem.momentum = 0.0
    assert torch.autograd.gradcheck(lambda *_: problem.forward(), leaves)
    assert torch.autograd.gradgradcheck(lambda *_: problem.forward(), leaves)


@every_active
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
def test_three_orders_at_once(mode: Mode, active: Active, device: str) -> None:
    """As in test_ops; elements are as far from kinks as above."""
    results = []
    for function in (Problem.forward, lambda p: active.of(elementary(p))):
        problem = make_active(active, (3, 4, 3, 2), LAYOUT["nhwc"], FLOAT64, mode, device=device)
        leaves = problem.require_grad()
        grads = [function(problem)]
        for _ in range(3):
            loss = torch.stack(
                [
                    (g * torch.linspace(-1, 2, g.numel(), device=device).view(g.shape)).sin().sum()
                    for g in grads
                ]
            )
            grads = list(torch.autograd.grad(loss.sum(), leaves, create_graph=True))
            results.append(grads)
    # A few hundred roundings, of terms as large as the largest result.
    for ours, expected in zip(results[:3], results[3:], strict=True):
        largest = max(float(tensor.detach().abs().max()) for tensor in expected)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12 * largest)


@every_active
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@every_dtype
@every_shape
def test_as_torchs_composition(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active, device: str
) -> None:
    """Which rounds once more, z to its dtype."""
    problem = make_active(active, shape, LAYOUT[layout], dtypes, mode, device=device)
    ours, theirs = problem.forward(), torchs_composition(problem, active)
    assert ours.dtype == theirs.dtype
    z, error = problem.affine
    given = active.activation, active.activation_param, dtypes.input
    one = tolerances.output(numpy(theirs), activation_tolerances.value_error(z, error, *given), dtypes.input)
    bound = 2 * one + activation_tolerances.composition_error(z, problem.input, *problem.scale, *given)
    tolerances.assert_within(ours, numpy(theirs), bound, "y")


@every_active
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@every_shape
def test_gradients_as_torchs_composition(
    layout: str, shape: tuple[int, ...], mode: Mode, active: Active, device: str
) -> None:
    """In float64, where no element is near enough to a kink to matter; a few hundred roundings of values below 100."""
    problem = make_active(active, shape, LAYOUT[layout], FLOAT64, mode, device=device)
    leaves = problem.require_grad()
    ours = torch.autograd.grad(problem.forward(), leaves, problem.dy)
    theirs = torch.autograd.grad(torchs_composition(problem, active), leaves, problem.dy)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@every_active
@every_dtype
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_exact_places(layout: str, dtypes: Dtypes, active: Active, device: str) -> None:
    """z is x or -x to the bit: NaN, infinities, what saturates, and kinks, where slopes are torch's.

    Slopes at kinks in float32 and float64: torch's 16-bit kernels differ there from element to element.
    """
    special = [float("nan"), float("inf"), -float("inf"), 2e4, -2e4, 90.0, -90.0, 12.0, -12.0, 0.5, -0.5]
    kinks = [0.0, -0.0, 3.0, -3.0, 6.0, -6.0]
    values = torch.tensor(special + kinks, dtype=dtypes.input, device=device).repeat(16)
    shape = (136, 2) if layout == "nc" else (4, 2, 2, 17)
    x = LAYOUT[layout].arrange(values.view(shape)).requires_grad_()
    mean, var = torch.zeros(2, 2, dtype=dtypes.parameters, device=device).unbind()
    weight = torch.tensor([1.0, -1.0], dtype=dtypes.parameters, device=device)
    y = batch_norm(
        x,
        mean,
        var + 1,
        weight,
        eps=0.0,
        activation=active.activation,
        activation_param=active.activation_param,
    )
    signs = weight.to(dtypes.input).view(-1, *[1] * (x.dim() - 2))
    expected = active.of(x * signs)
    # Values of one or less are rounded in arithmetic, then stored, here and there.
    eps = torch.finfo(dtypes.input).eps
    torch.testing.assert_close(y, expected, rtol=2 * eps, atol=8 * eps, equal_nan=True)
    if dtypes in (FLOAT32, FLOAT64):
        at_kinks = sum(x == kink for kink in kinks).bool()
        got, want = (torch.autograd.grad(t.sum(), x)[0][at_kinks] for t in (y, expected))
        torch.testing.assert_close(got, want, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("active", [RELU, RELU6], ids=str)
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@every_dtype
@every_shape
def test_selections_cost_no_bit(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active, device: str
) -> None:
    """They commute with rounding: the same bits as behind our layer, gradients of relu included. (relu6's slope is not
    that of the stored z where that is rounded up to 6.)
    """
    exact = 1 if active == RELU6 else 4
    results = []
    for fused in (True, False):
        problem = make_active(active, shape, LAYOUT[layout], dtypes, mode, device=device)
        leaves = problem.require_grad()
        problem.activation = active.activation if fused else None
        y = problem.forward() if fused else active.of(problem.forward())
        results.append([y, *torch.autograd.grad(y, leaves, problem.dy)][:exact])
    for name, one, other in zip(("y", "dx", "dweight", "dbias"), *results, strict=False):
        assert torch.equal(one, other), name


@every_active
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("layout", KEPT_LAYOUTS, ids=str)
def test_keeps_the_input_and_vectors(
    layout: Layout, dtypes: Dtypes, mode: Mode, active: Active, device: str
) -> None:
    """x itself and mean, invstd, weight and bias in float64: neither y nor z nor a mask."""
    shape = SHAPE_OF_RANK[layout.rank]
    problem = make_active(active, shape, layout, dtypes, mode, device=device)
    problem.require_grad()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = problem.forward()
    (whole,) = [t for t in kept if t.numel() > 4 * shape[1]]
    assert whole.data_ptr() == problem.x.data_ptr() != y.data_ptr()
    others = [t for t in kept if t is not whole]
    assert sum(t.numel() * t.element_size() for t in others) == 32 * shape[1]
    given = {t.data_ptr() for t in (problem.weight, problem.bias, problem.running_mean, problem.running_var)}
    assert not given & {t.data_ptr() for t in others}, "what the caller may write to"


@every_active
@pytest.mark.parametrize("training", [True, False])
def test_parameters_may_change_before_backward(training: bool, active: Active, device: str) -> None:
    """z is computed again from what it was computed from."""
    results = []
    for change in (False, True):
        mode = TRAIN if training else EVAL
        problem = make_active(active, (3, 5, 4, 5), LAYOUT["nchw"], FLOAT32, mode, device=device)
        leaves = problem.require_grad()
        y = problem.forward()
        if change:
            with torch.no_grad():
                for tensor in (problem.weight, problem.bias, problem.running_mean, problem.running_var):
                    assert tensor is not None
                    tensor.fill_(7)
        results.append(torch.autograd.grad(y, leaves, problem.dy))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
