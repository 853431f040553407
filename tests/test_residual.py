"""y = f(batch_norm(x) + residual) against the float64 reference and torch's composition, values and gradients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

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
    MASK_SIZES,
    MODES,
    PARAMETERS,
    RESIDUAL_KINDS,
    SHAPE_OF_RANK,
    SPLIT,
    SPLIT_IDS,
    TRAIN,
    Active,
    Dtypes,
    Layout,
    Mode,
)
from composed import torchs_composition
from judged import DIFFERENTIABLE, numpy
from problem import Problem, joined

RELU, RELU6, SILU = Active("relu"), Active("relu6"), Active("silu")
every_active = pytest.mark.parametrize("active", [None, *ACTIVE], ids=str)
every_kind = pytest.mark.parametrize("active", RESIDUAL_KINDS, ids=str)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES, ids=str)
train_and_eval = pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
SHAPES = [
    ("nc", (65, 33)),
    ("nchw", (3, 5, 4, 5)),
    ("nchw", (2, 3, 17, 31)),
    ("nhwc", (3, 37, 5, 7)),
]
some_shapes = pytest.mark.parametrize(("layout", "shape"), SHAPES[1::2], ids=str)
every_shape = pytest.mark.parametrize(("layout", "shape"), SHAPES, ids=str)


def check_all(problem: Problem, *wanted: str) -> None:
    leaves = problem.require_grad(*wanted)
    assert problem.residual is not None
    before = [problem.x.detach().clone(), problem.residual.detach().clone()]
    y = problem.forward()
    problem.check_output(y)
    for leaf, grad in zip(leaves, torch.autograd.grad(y, leaves, problem.dy), strict=True):
        leaf.grad = grad
    problem.check_grads()
    for tensor, same in zip((problem.x, problem.residual), before, strict=True):
        assert torch.equal(tensor, same), "what was read was written to"


@every_active
@every_mode
@every_dtype
@every_shape
def test_against_the_reference(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active | None, device: str
) -> None:
    problem = joined(active, shape, layout, dtypes, mode, device=device)
    check_all(problem)
    if mode.batch and mode.tracked:
        problem.check_running(0.1)


@pytest.mark.parametrize("active", [RELU, RELU6, SILU, None], ids=str)
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16_WITH_FLOAT32], ids=str)
@train_and_eval
@pytest.mark.parametrize("shapes", MASK_SIZES.values(), ids=MASK_SIZES.keys())
def test_sizes(
    shapes: list[tuple[str, tuple[int, ...]]], mode: Mode, dtypes: Dtypes, active: Active | None, device: str
) -> None:
    for layout, shape in shapes:
        check_all(joined(active, shape, layout, dtypes, mode, device=device))


@pytest.mark.parametrize("active", [RELU], ids=str)
@pytest.mark.parametrize(("layout", "shape"), SPLIT, ids=SPLIT_IDS)
def test_several_threads_and_tiles(layout: str, shape: tuple[int, ...], active: Active, device: str) -> None:
    check_all(joined(active, shape, layout, FLOAT32, TRAIN, device=device))


@every_kind
@train_and_eval
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(layout: Layout, mode: Mode, active: Active | None, device: str) -> None:
    """Of x, beside a residual that is contiguous."""
    problem = joined(active, SHAPE_OF_RANK[layout.rank], layout, FLOAT32, mode, device=device)
    assert problem.residual is not None
    problem.residual = problem.residual.contiguous()
    check_all(problem)
    assert problem.forward().is_contiguous(memory_format=layout.kept)


@every_kind
@pytest.mark.parametrize("residual", LAYOUTS, ids=str)
def test_every_layout_of_the_residual(residual: Layout, active: Active | None, device: str) -> None:
    """Beside an x of every layout that kernels know."""
    for layout in (known for known in KEPT_LAYOUTS if known.rank == residual.rank):
        shape = SHAPE_OF_RANK[layout.rank]
        problem = joined(active, shape, layout, FLOAT32, TRAIN, device=device, residual=residual)
        check_all(problem)
        problem.require_grad("residual")
        (dresidual,) = torch.autograd.grad(problem.forward(), problem.residual, problem.dy)
        assert dresidual.shape == shape


@every_kind
@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda names: "+".join(names) or "plain")
@every_mode
@every_dtype
def test_every_parameter_set(
    dtypes: Dtypes, mode: Mode, parameters: tuple[str, ...], active: Active | None, device: str
) -> None:
    for layout in ("nc", "nchw", "nhwc"):
        shape = SHAPE_OF_RANK[LAYOUT[layout].rank]
        check_all(joined(active, shape, layout, dtypes, mode, parameters, device=device))


SUBSETS = [wanted for n in (1, 2, 3) for wanted in itertools.combinations(DIFFERENTIABLE, n)]


@every_kind
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@train_and_eval
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_any_subset(
    layout: str, mode: Mode, wanted: tuple[str, ...], active: Active | None, device: str
) -> None:
    """With the bits that each has among all."""
    results = []
    for names in (wanted, DIFFERENTIABLE):
        problem = joined(active, SHAPE_OF_RANK[LAYOUT[layout].rank], layout, FLOAT32, mode, device=device)
        problem.require_grad(*names)
        problem.forward().backward(problem.dy)
        problem.check_grads()
        results.append([getattr(problem, name).grad for name in DIFFERENTIABLE])
    for name, alone, among in zip(DIFFERENTIABLE, *results, strict=True):
        assert torch.equal(alone, among) if name in wanted else alone is None, name


@every_active
@train_and_eval
@every_dtype
@some_shapes
def test_as_torchs_composition(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active | None, device: str
) -> None:
    """Which rounds twice more, what is normalised and the sum."""
    problem = joined(active, shape, layout, dtypes, mode, device=device)
    assert problem.residual is not None
    ours, theirs = problem.forward(), torchs_composition(problem, active)
    assert ours.dtype == theirs.dtype
    z, error = problem.affine
    given = problem.activation, problem.activation_param, dtypes.input
    one = tolerances.output(numpy(theirs), activation_tolerances.value_error(z, error, *given), dtypes.input)
    bound = 2 * one + activation_tolerances.composition_error(
        z, problem.input, *problem.scale, *given, numpy(problem.residual)
    )
    tolerances.assert_within(ours, numpy(theirs), bound, "y")


@every_active
@train_and_eval
@some_shapes
def test_gradients_as_torchs_composition(
    layout: str, shape: tuple[int, ...], mode: Mode, active: Active | None, device: str
) -> None:
    """In float64, as in test_activation; with a residual of its own, and with x as the residual."""
    for own in (True, False):
        problem = joined(active, shape, layout, FLOAT64, mode, device=device)
        problem.residual = problem.residual if own else problem.x
        leaves = problem.require_grad()[: 4 if own else 3]
        ours = torch.autograd.grad(problem.forward(), leaves, problem.dy)
        theirs = torch.autograd.grad(torchs_composition(problem, active), leaves, problem.dy)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("active", [RELU, RELU6], ids=str)
@train_and_eval
@every_dtype
@every_shape
def test_selections_cost_no_bit(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active, device: str
) -> None:
    """As in test_activation: the bits of y are those of torch's selection behind our sum."""
    problem = joined(active, shape, layout, dtypes, mode, device=device)
    y = problem.forward()
    problem = joined(None, shape, layout, dtypes, mode, device=device)
    assert torch.equal(y, active.of(problem.forward()))


@every_active
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_exact_places(layout: str, dtypes: Dtypes, active: Active | None, device: str) -> None:
    """z is the residual to the bit: NaN, infinities, what saturates, and kinks."""
    special = [float("nan"), float("inf"), -float("inf"), 2e4, -2e4, 90.0, -90.0, 0.5, -0.5]
    values = torch.tensor([*special, 0.0, -0.0, 3.0, -3.0, 6.0, -6.0], dtype=dtypes.input, device=device)
    shape = (120, 2) if layout == "nc" else (4, 2, 2, 15)
    residual = LAYOUT[layout].arrange(values.repeat(16).view(shape)).requires_grad_()
    x = torch.zeros_like(residual, requires_grad=True)
    mean, var = torch.zeros(2, 2, dtype=dtypes.parameters, device=device).unbind()
    y = batch_norm(
        x,
        mean,
        var + 1,
        eps=0.0,
        activation=active and active.activation,
        activation_param=active and active.activation_param,
        residual=residual,
    )
    expected = residual * 1 if active is None else active.of(residual)
    eps = torch.finfo(dtypes.input).eps
    torch.testing.assert_close(y, expected, rtol=2 * eps, atol=8 * eps, equal_nan=True)
    dx, dresidual = torch.autograd.grad(y.sum(), (x, residual))
    (want,) = torch.autograd.grad(expected.sum(), residual)
    finite = residual.isfinite()
    assert finite.sum() > np.prod(shape) / 2
    torch.testing.assert_close(dresidual[finite], want[finite], rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(dx, dresidual, rtol=0, atol=0, equal_nan=True)
