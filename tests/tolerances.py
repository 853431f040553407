"""How far a result may lie from the float64 reference, derived from number formats and from the problem.

Notation: u(dtype) is half the distance from 1 to the next number, the largest relative error of one rounding. A
result is computed in its *arithmetic* type (float64 for float64, float32 for all others), with per-channel values
in float64, and rounded once into its *storage* type:

    bound = u(storage) * |result| + smallest step(storage)            the one rounding of the result
          + u(arithmetic) * (roundings * size of each intermediate)   everything before

Intermediates are listed by size, so that cancellation is allowed for where the formula cancels and nowhere else.
All sums are over elements of a channel. A sum in s-element chains, merged in float64, has an error of about
u * sqrt(s) * sqrt(n) * rms(terms), far below u * sum|terms| for any n; CHAIN = 4 allows for short sums, where the
square roots do not help. That is of terms that round either way. Equal ones, as of dy = 1, may all round one way: in
float64 dbias is then off by up to 45 u for 4 million elements, where torch's is by 8 u. No test sums such.

No bound grows with mean/std in float32: deviations are taken from a centre near the mean, exactly, and the mean
itself is known in float64. What float64 cannot hold of it, u(float64) * |mean|, is the last term of the bounds.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# The error of the batch's mean, in units of u * standard deviation.
MEAN = 8
CHAIN = 4
# Roundings on the way from x to y or dx: deviation, factors of the channel, products, sums. In float64 the variance
# adds to them: it is summed around a centre up to two standard deviations off the mean, of which M2 = sum - n * d^2
# cancels 4 parts in 5. (Smaller types are summed in float32 over a batch and in float64 over batches: what is lost in
# a batch is one of many, as CHAIN has it.)
ROUNDINGS = {torch.float32: 6, torch.float64: 32}


def unit(dtype: torch.dtype) -> float:
    """u(dtype)."""
    return torch.finfo(dtype).eps / 2


def step(dtype: torch.dtype) -> float:
    """The smallest positive number; half of it is the largest error of a rounding near zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _stored(exact: Array, dtype: torch.dtype) -> Array:
    bound: Array = unit(dtype) * np.abs(exact) + step(dtype)
    return bound


def affine(xhat: Array, weight: Array, bias: Array, mean: Array, invstd: Array, dtype: torch.dtype) -> Array:
    """Of z = weight * xhat + bias before it is stored; per-channel arguments broadcast against xhat."""
    deviation = np.abs(weight * xhat)
    error = unit(arithmetic(dtype)) * (
        ROUNDINGS[arithmetic(dtype)] * deviation + MEAN * np.abs(weight) + 2 * np.abs(bias)
    )
    bound: Array = error + 4 * unit(torch.float64) * np.abs(weight * mean * invstd)
    return bound


def added(z: Array, z_error: Array, dtype: torch.dtype) -> Array:
    """Of z, the sum of a residual and what was off by `z_error`, before it is stored: one rounding."""
    bound: Array = z_error + unit(arithmetic(dtype)) * np.abs(z)
    return bound


def output(y: Array, z_error: Array, dtype: torch.dtype) -> Array:
    """Of y, z stored: what `affine` or an activation's `value_error` says, and one rounding."""
    return _stored(y, dtype) + z_error


def _product_error(a: Array, a_error: Array | float, b: Array, b_error: Array | float) -> Array:
    """Of a * b, each of them off."""
    bound: Array = np.abs(a) * b_error + a_error * (np.abs(b) + b_error)
    return bound


def input_grad(
    dx: Array,
    dy: Array,
    xhat: Array,
    scale: Array,
    mean: Array,
    invstd: Array,
    batch: bool,
    dtype: torch.dtype,
    dy_error: Array | float = 0.0,
    xhat_error: Array | float = 0.0,
) -> Array:
    """Of dx = scale * (dy - mean(dy) - xhat * mean(dy * xhat)), or scale * dy without `batch`.

    `scale` is weight * invstd. `dy_error`: how far off dy is already (it is dz before an activation); dx is linear in
    it. `xhat_error`: the same of xhat where it is not computed from x.
    """
    size, carried = np.abs(dy), np.broadcast_to(np.abs(dy_error), dy.shape)
    if batch and dx.size:
        axes = (0, *range(2, dx.ndim))
        slope = np.abs(dy * xhat).mean(axes, keepdims=True)
        size = size + np.abs(dy).mean(axes, keepdims=True) + (np.abs(xhat) + 1) * slope
        slope_error = _product_error(dy, carried, xhat, xhat_error).mean(axes, keepdims=True)
        carried = (
            carried
            + carried.mean(axes, keepdims=True)
            + (np.abs(xhat) + xhat_error) * slope_error
            + xhat_error * np.abs((dy * xhat).mean(axes, keepdims=True))
        )
        # A wrong mean shifts xhat.
        lost = (
            8
            * unit(torch.float64)
            * np.abs(mean * invstd * scale)
            * (slope + np.abs(dy).mean(axes, keepdims=True))
        )
    else:
        lost = np.zeros_like(scale)
    return (
        _stored(dx, dtype)
        + unit(arithmetic(dtype)) * ROUNDINGS[arithmetic(dtype)] * np.abs(scale) * size
        + np.abs(scale) * carried
        + lost
    )


def weight_grad(
    dweight: Array,
    dy: Array,
    xhat: Array,
    mean: Array,
    invstd: Array,
    stored: torch.dtype,
    dtype: torch.dtype,
    dy_error: Array | float = 0.0,
    xhat_error: Array | float = 0.0,
) -> Array:
    """Of dweight = sum(dy * xhat), for input of `dtype` and a gradient `stored` in another; errors as above."""
    axes = (0, *range(2, dy.ndim))
    shift = np.abs(dy).sum(axes)
    terms = np.abs(dy * xhat).sum(axes) + shift
    lost = 4 * unit(torch.float64) * np.abs(mean * invstd) * shift
    carried = _product_error(dy, dy_error, xhat, xhat_error).sum(axes)
    if dtype == torch.float64:
        # The variance, as in ROUNDINGS, and the mean; those of smaller types are folded in float64.
        variance = ROUNDINGS[torch.float64] - ROUNDINGS[torch.float32]
        lost = lost + unit(dtype) * (variance * np.abs(dweight) + MEAN * np.abs(dy.sum(axes)))
    return _stored(dweight, stored) + unit(arithmetic(dtype)) * CHAIN * terms + lost + carried


def bias_grad(
    dbias: Array, dy: Array, stored: torch.dtype, dtype: torch.dtype, dy_error: Array | float = 0.0
) -> Array:
    """Of dbias = sum(dy); `dy_error` as above."""
    axes = (0, *range(2, dy.ndim))
    terms, carried = np.abs(dy).sum(axes), np.broadcast_to(dy_error, dy.shape).sum(axes)
    return _stored(dbias, stored) + unit(arithmetic(dtype)) * CHAIN * terms + carried


def residual_grad(dz: Array, dtype: torch.dtype, dz_error: Array | float = 0.0) -> Array:
    """Of dz, stored."""
    return _stored(dz, dtype) + dz_error


def running_mean(
    new: Array, old: Array, mean: Array, var: Array, momentum: float, stored: torch.dtype, dtype: torch.dtype
) -> Array:
    """Of (1 - momentum) * old + momentum * mean; the update itself is in float64, the mean as above."""
    error = unit(arithmetic(dtype)) * MEAN * momentum * np.sqrt(var)
    return _stored(new, stored) + error + 4 * unit(torch.float64) * (np.abs(old) + np.abs(mean))


def running_var(
    new: Array, old: Array, var: Array, momentum: float, stored: torch.dtype, dtype: torch.dtype
) -> Array:
    """Of (1 - momentum) * old + momentum * var; a variance errs twice as much as a standard deviation."""
    error = unit(arithmetic(dtype)) * 2 * ROUNDINGS[arithmetic(dtype)] * momentum * var
    return _stored(new, stored) + error + 4 * unit(torch.float64) * np.abs(old)


def assert_within(actual: Tensor, expected: Array, bound: Array, what: str) -> None:
    """Every element of `actual` within `bound` of `expected`; infinities and NaN must be the same in both."""
    values = actual.detach().to("cpu", torch.float64).numpy()
    assert values.shape == expected.shape, f"{what}: shape {values.shape}, expected {expected.shape}"
    if not values.size:
        return
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(values[~finite], expected[~finite], err_msg=what)
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(values - expected), 0.0)
    ratio = np.where(np.isnan(error), np.inf, error / np.broadcast_to(bound, error.shape))
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    assert ratio[worst] <= 1, (
        f"{what}: at {tuple(map(int, worst))} got {values[worst]:.17g}, expected {expected[worst]:.17g}; "
        f"error {error[worst]:.3g} is {ratio[worst]:.3g} times the bound "
        f"({int((ratio > 1).sum())} of {ratio.size} are out)"
    )
