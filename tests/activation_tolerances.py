"""How far an activation may take a result from the float64 reference; continues tolerances.py, with its notation.

The activation f is taken of z, which is off by `tolerances.affine` and rounded to the arithmetic type only, never to
the storage type. To first order, with u = u(arithmetic):

    y  = f(z)          max|f'| * error(z) + u * roundings of f
    dz = dy * f'(z)    |dy| * (max|f''| * error(z) + u * roundings of f' + jump of f' if z may be beyond it) + u * |dz|

Roundings are counted along the formulas below, in units of u of the largest intermediate, so that cancellation is
allowed for where those formulas cancel. Elementary functions count ELEMENTARY each: two units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bnext import reference_activations
from bnext.reference_activations import slope, value
from tolerances import arithmetic, step, unit

Array = NDArray[np.float64]
Of = Callable[[Array, float], Array]  # of z and the parameter p

ELEMENTARY = 4


@dataclass(frozen=True)
class Bounds:
    """Of one activation, with parameter p."""

    steepness: Callable[[float], float]  # max |f'|
    curvature: Callable[[float], float]  # max |f''|, kinks apart
    value: Of  # roundings of f and of f', times the size of what is rounded
    slope: Of
    kinks: Callable[[float], list[tuple[float, float]]] = lambda p: []  # where f' jumps, and by how much


def sigmoid(z: Array) -> Array:
    return value(z, "sigmoid")


BOUNDS: dict[str, Bounds] = {
    # Selections: nothing is rounded.
    "relu": Bounds(lambda p: 1, lambda p: 0, lambda z, p: 0 * z, lambda z, p: 0 * z, lambda p: [(0, 1)]),
    "relu6": Bounds(
        lambda p: 1, lambda p: 0, lambda z, p: 0 * z, lambda z, p: 0 * z, lambda p: [(0, 1), (6, 1)]
    ),
    # p is rounded, then the product.
    "leaky_relu": Bounds(
        lambda p: max(1, abs(p)),
        lambda p: 0,
        lambda z, p: 2 * np.abs(p * z),
        lambda z, p: abs(p) + 0 * z,
        lambda p: [(0, abs(1 - p))],
    ),
    # s = 1 / (1 + exp(-z)): an elementary function, a sum, a quotient, 6 in all. f' = s * (1 - s): 6 of each s, the
    # difference, which cancels down from 1, and the product.
    "sigmoid": Bounds(
        lambda p: 0.25,
        lambda p: 0.1,
        lambda z, p: 6 * sigmoid(z),
        lambda z, p: 8 * sigmoid(z),
    ),
    # f = z * s: 6 and the product. f' = s * (1 + z * (1 - s)): 6 of s, 1 of each product and sum of terms that reach
    # s * |z|, and 6 more of 1 - s, where it cancels.
    "silu": Bounds(
        lambda p: 1.1,
        lambda p: 0.5,
        lambda z, p: 7 * np.abs(z) * sigmoid(z),
        lambda z, p: 11 * sigmoid(z) * (1 + np.abs(z)),
    ),
    # f = z / 2 * (1 + erf(z / sqrt(2))): the argument is off by 2 units, erf by less than 1 for that and by 4 itself,
    # the sum of up to 2 by 2; half of 7 times |z|, and 2 for the products. f' = that sum / 2 + z * exp(-z^2 / 2) / c:
    # 3.5 and 1 for the product; |z| exp() / c <= 0.25 with 7 roundings and z^2 times its argument's 1.5, at most 0.7;
    # 1 for the sum.
    "gelu": Bounds(
        lambda p: 1.13,
        lambda p: 0.8,
        lambda z, p: 6 * np.abs(z),
        lambda z, p: 8 + 0 * z,
    ),
    # f = p * (exp(z) - 1): 4 of the exponential, the difference that cancels, p and the product. f' = f + p: and a sum.
    "elu": Bounds(
        lambda p: max(1, abs(p)),
        lambda p: abs(p),
        lambda z, p: np.where(z < 0, 7 * abs(p), 0),
        lambda z, p: np.where(z < 0, 8 * abs(p), 0),
        lambda p: [(0, abs(1 - p))],
    ),
    # f = z * min(max(z + 3, 0), 6) / 6: a sum, a product, a quotient or a product with 1/6. f' = (2z + 3) / 6.
    "hardswish": Bounds(
        lambda p: 1.5,
        lambda p: 1 / 3,
        lambda z, p: 4 * np.abs(value(z, "hardswish")),
        lambda z, p: 4 * np.where(np.abs(z) <= 3, np.abs(z) / 3 + 0.5, 0),
        lambda p: [(-3, 0.5), (3, 0.5)],
    ),
    # f = (1 - e) / (1 + e) with e = exp(-2|z|): 4e and 1 above, 4e and 1 below, the quotient; with e <= 1 below 4.
    # f' = 1 - f^2: twice 4, the square, the difference.
    "tanh": Bounds(
        lambda p: 1,
        lambda p: 0.77,
        lambda z, p: 4 + 0 * z,
        lambda z, p: 10 + 0 * z,
    ),
}


def _tiny(z: Array, dtype: torch.dtype) -> Array:
    """Where an exponential falls below the normal numbers, it may as well be zero, also as a factor of z."""
    bound: Array = torch.finfo(arithmetic(dtype)).smallest_normal * (1 + np.abs(z))
    return bound


def value_error(
    z: Array, z_error: Array, activation: str | None, activation_param: float | None, dtype: torch.dtype
) -> Array:
    """Of f(z), before it is stored; z may be off by `z_error`."""
    if activation is None:
        return z_error
    of, p = BOUNDS[activation], reference_activations.parameter(activation, activation_param)
    return of.steepness(p) * z_error + unit(arithmetic(dtype)) * of.value(z, p) + _tiny(z, dtype)


def dz_error(
    dy: Array,
    z: Array,
    z_error: Array,
    activation: str | None,
    activation_param: float | None,
    dtype: torch.dtype,
) -> Array:
    """Of dz = dy * f'(z); z may be off by `z_error`, and where that takes it beyond a kink, f' by the jump."""
    if activation is None:
        return np.zeros_like(dy)
    of, p = BOUNDS[activation], reference_activations.parameter(activation, activation_param)
    u = unit(arithmetic(dtype))
    error = of.curvature(p) * z_error + u * of.slope(z, p) + _tiny(z, dtype)
    for place, jump in of.kinks(p):
        error = error + np.where(np.abs(z - place) <= z_error, jump, 0.0)
    return np.abs(dy) * (error + u * np.abs(slope(z, activation, activation_param)))


def composition_error(
    z: Array,
    x: Array,
    mean: Array,
    scale: Array,
    activation: str | None,
    activation_param: float | None,
    dtype: torch.dtype,
    residual: Array | None = None,
) -> Array:
    """What torch's batch norm, sum and activation, one after the other, may be off by beside `value_error`.

    What is normalised is stored in between; it is x * scale + shift, three roundings of terms that do not shrink with
    x - mean. With a residual the sum is stored as well.
    """
    p = reference_activations.parameter(activation, activation_param)
    terms = np.abs(x * scale) + np.abs(mean * scale)
    stored = unit(dtype) * np.abs(z) + step(dtype)
    if residual is not None:
        stored = stored + unit(dtype) * np.abs(z - residual) + step(dtype)
    steepness = 1.0 if activation is None else BOUNDS[activation].steepness(p)
    bound: Array = steepness * (stored + 3 * unit(arithmetic(dtype)) * terms)
    return bound
