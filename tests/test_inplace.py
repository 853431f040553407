"""Batch normalization over its input: the values and updates of the other form, gradients from the output alone."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from bits import assert_same_bits
from bnext.functional import batch_norm
from cases import (
    BFLOAT16_WITH_FLOAT32,
    DTYPES,
    EVAL,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INVERTIBLE,
    LAYOUT,
    LAYOUTS,
    MODES,
    PARAMETERS,
    SHAPE_OF_RANK,
    SPLIT,
    SPLIT_IDS,
    THREADS,
    TRAIN,
    Active,
    Dtypes,
    Layout,
    Mode,
)
from operators import FORWARD, INPLACE, forward_arguments, inplace_arguments
from problem import Problem, make_active

every_active = pytest.mark.parametrize("active", INVERTIBLE, ids=str)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES, ids=str)
train_and_eval = pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
SHAPES = [
    ("nc", (12, 5)),
    ("nc", (65, 33)),
    ("ncl", (4, 3, 49)),
    ("nchw", (3, 5, 4, 5)),
    ("nchw", (2, 3, 17, 31)),
    ("nhwc", (3, 37, 5, 7)),
    ("ndhwc", (2, 5, 3, 4, 3)),
]
every_shape = pytest.mark.parametrize(("layout", "shape"), SHAPES, ids=str)
# Where no element is at two places.
WRITABLE = [layout for layout in LAYOUTS if "expanded" not in layout.name]


def make(
    active: Active | None,
    shape: tuple[int, ...],
    layout: Layout | str,
    dtypes: Dtypes,
    mode: Mode,
    parameters: tuple[str, ...] = ("weight", "bias"),
    device: str = "cpu",
    inplace: bool = True,
) -> Problem:
    layout = LAYOUT[layout] if isinstance(layout, str) else layout
    return make_active(active, shape, layout, dtypes, mode, parameters, device=device, inplace=inplace)


def check_all(problem: Problem, *wanted: str) -> None:
    problem.require_grad(*wanted)
    y = problem.forward()
    problem.check_output(y)
    y.backward(problem.dy)
    problem.check_grads()


@every_active
@every_mode
@every_dtype
@every_shape
def test_against_the_reference(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active | None, device: str
) -> None:
    problem = make(active, shape, layout, dtypes, mode, device=device)
    check_all(problem)
    if mode.batch and mode.tracked:
        problem.check_running(0.1)


# Small planes, sizes around those of vectors, one channel, many channels.
SIZES = [
    *(("ncl", (3, 5, inner)) for inner in (2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)),
    *(("nc", (n, c)) for n, c in ((5, 15), (5, 16), (3, 31), (3, 33), (3, 1001), (1001, 2), (300, 1))),
    *((layout, shape) for layout in ("nchw", "nhwc") for shape in ((2, 1001, 3, 3), (5, 1, 13, 11))),
]


@every_active
@train_and_eval
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16_WITH_FLOAT32, FLOAT16], ids=str)
def test_sizes(dtypes: Dtypes, mode: Mode, active: Active | None, device: str) -> None:
    for layout, shape in SIZES:
        check_all(make(active, shape, layout, dtypes, mode, device=device))


@pytest.mark.parametrize(("layout", "shape"), SPLIT[::2], ids=SPLIT_IDS[::2])
def test_several_threads_and_tiles(layout: str, shape: tuple[int, ...], device: str) -> None:
    check_all(make(Active("elu"), shape, layout, FLOAT32, TRAIN, device=device))


@every_active
@train_and_eval
@pytest.mark.parametrize("layout", WRITABLE, ids=str)
def test_every_layout(layout: Layout, mode: Mode, active: Active | None, device: str) -> None:
    check_all(make(active, SHAPE_OF_RANK[layout.rank], layout, FLOAT32, mode, device=device))


@pytest.mark.parametrize("active", [None, Active("elu", 0.5)], ids=str)
@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda names: "+".join(names) or "plain")
@every_mode
@every_dtype
def test_every_parameter_set(
    dtypes: Dtypes, mode: Mode, parameters: tuple[str, ...], active: Active | None, device: str
) -> None:
    for layout in ("nc", "nchw", "nhwc"):
        shape = SHAPE_OF_RANK[LAYOUT[layout].rank]
        check_all(make(active, shape, layout, dtypes, mode, parameters, device=device))


SUBSETS = [c for n in (1, 2) for c in itertools.combinations(("x", "weight", "bias"), n)]


@every_active
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@train_and_eval
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_any_subset(
    layout: str, mode: Mode, wanted: tuple[str, ...], active: Active | None, device: str
) -> None:
    problem = make(active, SHAPE_OF_RANK[LAYOUT[layout].rank], layout, FLOAT32, mode, device=device)
    check_all(problem, *wanted)
    for name in {"x", "weight", "bias"} - set(wanted):
        assert getattr(problem, name).grad is None


@every_active
@train_and_eval
@every_dtype
@every_shape
def test_the_bits_of_the_other_form(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active | None, device: str
) -> None:
    """y in x's memory, statistics, running statistics and the counter."""
    over, beside = (make(active, shape, layout, dtypes, mode, device=device) for _ in range(2))
    ours, theirs = inplace_arguments(over), forward_arguments(beside)
    stats = INPLACE(*ours)
    y, expected, _ = FORWARD(*theirs)
    assert torch.equal(ours[0], y)
    assert torch.equal(stats, expected)
    for one, other in zip(ours[1:6], theirs[2:7], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@every_active
@every_mode
@pytest.mark.parametrize("layout", WRITABLE, ids=str)
def test_the_memory_is_the_inputs(layout: Layout, mode: Mode, active: Active | None, device: str) -> None:
    """The very tensor; around a slice nothing is written."""
    problem = make(active, SHAPE_OF_RANK[layout.rank], layout, FLOAT32, mode, device=device)
    x, old = problem.copied(), problem.copied()
    elsewhere = torch.ones(x.untyped_storage().nbytes() // 4, dtype=torch.bool, device=device)
    elsewhere.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)

    def memory(t: Tensor) -> Tensor:
        return torch.empty(0, device=device).set_(t.untyped_storage())

    address, version = x.data_ptr(), x._version
    y = over(problem, x)
    assert y is x and y.data_ptr() == address
    assert y._version > version
    assert y.stride() == old.stride()
    problem.check_output(y)
    around = [memory(t)[elsewhere] for t in (y, old)]
    torch.testing.assert_close(*around, rtol=0, atol=0, equal_nan=True)


def over(problem: Problem, x: Tensor) -> Tensor:
    """The problem's call on another input."""
    vectors = problem.running_mean, problem.running_var, problem.weight, problem.bias
    return batch_norm(
        x,
        *vectors,
        problem.batch,
        activation=problem.activation,
        activation_param=problem.activation_param,
        inplace=True,
    )


@every_active
@every_mode
@every_shape
def test_the_gradients_of_the_other_form(
    layout: str, shape: tuple[int, ...], mode: Mode, active: Active | None, device: str
) -> None:
    """In float64: 1e-16 times |z / weight|, at most 60, times the steepness of what inverts elu, exp(15)."""
    results = []
    for inplace in (True, False):
        problem = make(active, shape, layout, FLOAT64, mode, device=device, inplace=inplace)
        leaves = problem.require_grad()
        results.append(torch.autograd.grad(problem.forward(), leaves, problem.dy))
    largest = max(float(grad.abs().max()) for grad in results[1])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10 * largest)


@every_active
@train_and_eval
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_derivatives(layout: str, mode: Mode, active: Active | None, device: str) -> None:
    """First order against differences; what a weight of 0.3 adds to their error is small beside it."""
    problem = make(active, (2, 3, 2, 2), layout, FLOAT64, mode, device=device)
    assert abs(problem.affine[0]).min() > 1e-3
    leaves = problem.require_grad()
    problem.momentum = 0.0
    assert torch.autograd.gradcheck(lambda *_: problem.forward(), leaves)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize(
    ("active", "dtypes", "mode"),
    [(Active("elu"), FLOAT32, TRAIN), (Active("leaky_relu"), BFLOAT16_WITH_FLOAT32, EVAL)],
    ids=str,
)
@pytest.mark.parametrize(("layout", "shape"), SPLIT, ids=SPLIT_IDS)
def test_any_number_of_threads(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active | None
) -> None:
    collected = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        collected.append(make(active, shape, layout, dtypes, mode).step())
    for other in collected[1:]:
        assert_same_bits(collected[0], other)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0, 4)], ids=str)
@every_mode
@every_active
def test_empty(active: Active | None, mode: Mode, shape: tuple[int, ...], device: str) -> None:
    problem = make(active, shape, "nc" if len(shape) == 2 else "nchw", FLOAT32, mode, device=device)
    leaves = problem.require_grad()
    y = problem.forward()
    dx, dweight, dbias = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == dx.shape == shape
    assert not dweight.any() and not dbias.any()


@every_active
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
def test_saturated(dtypes: Dtypes, active: Active | None, device: str) -> None:
    """A bias that puts whole channels where elu is flat to the last bit: xhat is not known there, and not NaN."""
    problem = make(active, (16, 5, 6, 7), "nhwc", dtypes, TRAIN, device=device)
    assert problem.bias is not None
    problem.bias.copy_(torch.tensor([-200.0, -40.0, -12.0, 0.0, 12.0]))
    check_all(problem)
    assert all(bool(t.grad.isfinite().all()) for t in (problem.x, problem.weight, problem.bias))


@pytest.mark.parametrize("activation", ["leaky_relu", "elu"])
def test_a_parameter_that_float32_rounds_to_zero(activation: str, device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(6, 2, device=device, dtype=dtype, requires_grad=True)
        given = x * 1
        call = partial(batch_norm, given, None, None, training=True, activation=activation, inplace=True)
        if dtype == torch.float64:
            assert torch.autograd.grad(call(activation_param=1e-46).sum(), x)[0].isfinite().all()
        else:
            with pytest.raises(ValueError, match="with a positive parameter"):
                call(activation_param=1e-46)
            assert torch.equal(given, x)
