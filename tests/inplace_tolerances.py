"""How far a backward that knows the output alone may lie from the float64 reference; continues tolerances.py.

What was stored over x is y = f(z), off by `tolerances.output`. Backward takes z = f^-1(y) from it, and with that
xhat = (z - bias) / weight, whose error grows with |z / weight| and with 1 / f'(z):

    error(xhat) = (error(z) + error(stored y) / f'(z) + u * roundings of f^-1) / |weight|

elu is flat far below zero, where the first order does not tell: f^-1 is monotone, so that it is taken of both ends of
what y may be. There z is known to lie below log(u(storage) / 2) and no better, which is what f^-1 gives.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from activation_tolerances import BOUNDS, ELEMENTARY, value_error
from bnext.reference_activations import parameter, value
from tolerances import arithmetic, step, unit

Array = NDArray[np.float64]


def inverse(y: Array, activation: str | None, p: float, dtype: torch.dtype) -> Array:
    """z of f(z) = y, as it can be told from y stored in `dtype`."""
    if activation is None:
        return y
    low = np.minimum(y, 0) / p
    if activation == "elu":
        with np.errstate(divide="ignore"):
            low = np.maximum(np.log1p(np.maximum(low, -1)), math.log(unit(dtype) / 2))
    return np.where(y > 0, y, low)


def z_error(
    z: Array, error: Array, activation: str | None, activation_param: float | None, dtype: torch.dtype
) -> Array:
    """Of z from the stored f(z), where the z that f was given was off by `error`."""
    p, u = parameter(activation, activation_param), unit(arithmetic(dtype))
    y = value(z, activation, activation_param)
    # Of y: its own rounding to storage and to arithmetic, and the quotient y / p with its rounded p.
    off = unit(dtype) * np.abs(y) + step(dtype)
    inverted = np.zeros_like(z)
    if activation is not None:
        off = off + u * BOUNDS[activation].value(z, p) + 2 * u * np.where(z < 0, np.abs(y), 0)
        inverted = ELEMENTARY * u * np.where(z < 0, np.abs(z), 0)
    ends = (
        inverse(value(z + sign * error, activation, activation_param) + sign * off, activation, p, dtype)
        for sign in (-1, 1)
    )
    widest: Array = np.maximum(*(np.abs(end - z) for end in ends))
    return widest + inverted


def dz_error(
    dy: Array,
    z: Array,
    error: Array,
    activation: str | None,
    activation_param: float | None,
    dtype: torch.dtype,
) -> Array:
    """Of dz = dy * f'(z), which below zero is p for leaky_relu and y + p for elu; z was off by `error`."""
    if activation is None:
        return np.zeros_like(dy)
    p, u = parameter(activation, activation_param), unit(arithmetic(dtype))
    y = value(z, activation, activation_param)
    off = np.zeros_like(z)
    if activation == "elu":
        off = (
            value_error(z, error, activation, activation_param, dtype) + unit(dtype) * np.abs(y) + step(dtype)
        )
    # p is rounded, then the sum and the product.
    slope_error = np.where(z - error <= 0, off + 3 * u * p, 0)
    # The smallest z are stored as zero.
    beyond = np.abs(z) <= error + step(dtype)
    bound: Array = np.abs(dy) * (slope_error + np.where(beyond, abs(1 - p), 0))
    return bound
