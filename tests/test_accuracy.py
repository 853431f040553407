"""Numbers that are hard for batch normalization: means far from zero, constants, outliers, NaN and infinities.

The bars for large means are absolute errors of y, whose values lie within +-5, against float64 on the stored input.
torch itself reaches 1.8e-3 (contiguous) and 6.2 (channels_last) at mean 1e5, and does not give a constant its bias.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bnext import reference
from bnext.functional import batch_norm
from cases import (
    BFLOAT16,
    BFLOAT16_WITH_FLOAT32,
    EVAL,
    FLOAT16_WITH_FLOAT32,
    FLOAT32,
    FLOAT64,
    KEPT_LAYOUTS,
    KEPT_OF_RANK,
    LAYOUT,
    SHAPE_OF_RANK,
    TRAIN,
    Dtypes,
    Layout,
)
from judged import numpy
from outliers import LONG, MISLED, looked_at
from problem import make

LARGE = (64, 32, 32, 32)
# The rounding of y and of xhat at 5 is 2 * 2^-24 * 8 = 1e-6 at worst; as much again for scale, product and mean.
OUTPUT_BAR = 2e-6
# 65536 terms of size 0.6: u * sum|terms| = 2.5e-3, and a sum in blocks stays below four of those.
WEIGHT_GRAD_BAR = 1e-2


def large_mean(mean: float, layout: str, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(LARGE, generator=generator) + mean
    dy = torch.randn(LARGE, generator=generator)
    return LAYOUT[layout].arrange(x.to(device)), dy.to(device)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_large_mean(layout: str, mean: float, device: str) -> None:
    x, dy = large_mean(mean, layout, device)
    weight = torch.ones(LARGE[1], device=device, requires_grad=True)
    y = batch_norm(x.requires_grad_(), None, None, weight, training=True)
    y.backward(dy)
    statistics = reference.statistics(numpy(x))
    expected = reference.forward(numpy(x), None, None, *statistics, 1e-5)
    dx, dweight, _ = reference.backward(numpy(dy), numpy(x), None, *statistics, 1e-5, True)
    assert np.abs(numpy(y) - expected).max() <= OUTPUT_BAR
    assert np.abs(numpy(weight.grad) - dweight).max() <= WEIGHT_GRAD_BAR
    # dx is dy and a small correction, divided by a standard deviation of 1: the bar of y holds for it.
    assert np.abs(numpy(x.grad) - dx).max() <= OUTPUT_BAR


@pytest.mark.parametrize("mean", [1e3, 1e4, 1e5])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_large_mean_in_running_statistics(layout: str, mean: float, device: str) -> None:
    """float32 buffers cannot hold more of the mean than u * mean; of the variance, everything."""
    x, _ = large_mean(mean, layout, device)
    running_mean, running_var = torch.zeros(2, LARGE[1], device=device)
    batch_norm(x, running_mean, running_var, training=True, momentum=1.0, unbiased_running_var=False)
    expected_mean, expected_var = reference.statistics(numpy(x))
    assert np.abs(numpy(running_mean) - expected_mean).max() <= 2**-24 * 2 * mean
    np.testing.assert_allclose(numpy(running_var), expected_var, rtol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e5])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_large_mean_in_eval(layout: str, mean: float, device: str) -> None:
    """(x - mean) * scale; the folded x * scale + shift is off by 2.6e-4 at 1e4."""
    x, _ = large_mean(mean, layout, device)
    running_mean = torch.full((LARGE[1],), mean + 0.5, device=device)
    y = batch_norm(x, running_mean, torch.full_like(running_mean, 0.75), eps=1e-5)
    expected = reference.forward(numpy(x), None, None, numpy(running_mean), np.full(LARGE[1], 0.75), 1e-5)
    assert np.abs(numpy(y) - expected).max() <= OUTPUT_BAR


@pytest.mark.parametrize("mean", [100.0, 1e4])
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16, FLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("layout", KEPT_LAYOUTS, ids=str)
def test_no_bound_grows_with_the_mean(layout: Layout, dtypes: Dtypes, mean: float, device: str) -> None:
    """The bounds of every other test, far from zero. 16-bit inputs are coarse there, but they are what is stored."""
    problem = make(SHAPE_OF_RANK[layout.rank], layout, dtypes, TRAIN, device=device, mean=mean)
    problem.require_grad()
    y = problem.forward()
    problem.check_output(y)
    y.backward(problem.dy)
    problem.check_grads()


# A constant of each dtype, exactly representable or not; 1e7 is where float32 has lost the digits after the point.
CONSTANTS = [
    (FLOAT32, 1e7),
    (FLOAT32, 0.1),
    (FLOAT64, 1e7 / 3),
    (BFLOAT16, 3e38),
    (FLOAT16_WITH_FLOAT32, 65504.0),
]


@pytest.mark.parametrize(("dtypes", "constant"), CONSTANTS, ids=str)
@pytest.mark.parametrize("shape", [LARGE, (3, 5, 7, 7), (2, 1, 1, 1), (6000, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_constant_input_gives_the_bias(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, constant: float, device: str
) -> None:
    x = LAYOUT[layout].arrange(torch.full(shape, constant, dtype=dtypes.input, device=device))
    bias = torch.linspace(-2, 3, shape[1], dtype=dtypes.parameters, device=device)
    weight = torch.full_like(bias, 7)
    mean, var = torch.zeros_like(bias), torch.ones_like(bias)
    y = batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0)
    expected = bias.to(dtypes.input).view(1, -1, 1, 1).expand(shape)
    assert torch.equal(y, expected)
    assert torch.equal(mean, x[0, :, 0, 0].to(mean.dtype))
    assert torch.equal(var, torch.zeros_like(var))


@pytest.mark.parametrize("outlier", [1e3, 3e4])
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16_WITH_FLOAT32, FLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("layout", LONG)
def test_outliers_where_the_center_is_looked_for(
    layout: str, dtypes: Dtypes, outlier: float, device: str
) -> None:
    """The center is then a bad one: the bounds hold all the same, and the other channels have the bits they had."""
    problem = make(LONG[layout], LAYOUT[layout], dtypes, TRAIN, device=device)
    plain = problem.forward()
    problem = make(LONG[layout], LAYOUT[layout], dtypes, TRAIN, device=device)
    for sample in MISLED:
        n, *space = looked_at(LONG[layout], layout, sample)
        problem.x[(n, 0, *space)] = outlier
    problem.require_grad()
    y = problem.forward()
    assert torch.equal(y[:, 1:], plain[:, 1:])
    problem.check_output(y)
    problem.check_running(0.1)
    y.backward(problem.dy)
    problem.check_grads()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "shape", [(64, 19), (8, 19, 7), (4, 19, 7, 7), (3, 19, 40, 40), (2, 19, 3, 3, 3)], ids=str
)
def test_poison_stays_in_its_channel(shape: tuple[int, ...], poison: float, device: str) -> None:
    others = [channel for channel in range(shape[1]) if channel != 8]
    for layout in KEPT_OF_RANK[len(shape)]:
        results = []
        for value in (0.0, poison):
            problem = make(shape, layout, FLOAT32, TRAIN, device=device)
            problem.x[(1, 8, *[0] * (len(shape) - 2))] = value
            leaves = problem.require_grad()
            y = problem.forward()
            grads = torch.autograd.grad(y, leaves, problem.dy)
            results.append(
                (
                    y,
                    grads[0],
                    *(t.view(1, -1) for t in (*grads[1:], problem.running_mean, problem.running_var)),
                )
            )
        for clean, poisoned in zip(*results, strict=True):
            assert torch.equal(clean[:, others], poisoned[:, others])
        assert results[1][0][:, 8].isnan().any(), "a NaN is not hidden either"
        assert results[1][1][:, 8].isnan().any()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_scale_of_the_input(scale: float, layout: str, device: str) -> None:
    """Squares that leave float32's range at one end or lose to eps at the other: 1e30 is still below 3.4e38."""
    problem = make((4, 5, 9, 9), LAYOUT[layout], FLOAT32, TRAIN, device=device)
    problem.x = problem.x * scale
    problem.require_grad()
    y = problem.forward()
    problem.check_output(y)
    y.backward(problem.dy)
    problem.check_grads()


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("scale", [1e25, 2e37])
def test_squares_beyond_float32(layout: str, dtypes: Dtypes, scale: float) -> None:
    """Of values that float32 and bfloat16 hold, sums over a batch in the end too: y on the CPU as of any others."""
    problem = make((4, 5, 9, 9), LAYOUT[layout], dtypes, TRAIN)
    problem.x[:, 1:3] *= scale
    problem.running_var = None
    problem.running_mean = None
    problem.check_output(problem.forward())


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_eval_without_variance(layout: str, device: str) -> None:
    """eps = 0 is legal in eval: the exact quotient, and an infinity where the variance is zero."""
    problem = make((2, 3, 4, 4), LAYOUT[layout], FLOAT32, EVAL, device=device)
    problem.eps = 0.0
    problem.check_output(problem.forward())
    zero = torch.zeros(3, device=device)
    y = batch_norm(problem.x.abs() + 1, zero, zero, eps=0.0)
    assert torch.equal(y, torch.full_like(y, float("inf")))
