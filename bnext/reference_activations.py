"""Batch normalization with a residual and an activation in NumPy and float64: what `reference` is to the bare layer.

An activation is a function f of one number z, here with its derivative, written as in textbooks but for sums that
would cancel. Where a derivative jumps, it has at the very place the value that torch's has. f of NaN is NaN, its
derivative there is nobody's; at an infinity f is what its formula gives, so that silu, gelu and hardswish of minus
infinity, 0 * inf, are NaN as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import reference

Array = NDArray[np.float64]


class Activation(NamedTuple):
    """f and f' for numbers z and a parameter p, and the p that stands for None; f has none where that is None."""

    value: Callable[[Array, float], Array]
    slope: Callable[[Array, float], Array]
    default: float | None = None


def _sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)), with an exponential that does not overflow."""
    e = np.exp(-np.abs(z))
    return np.asarray(np.where(z < 0, e, 1.0) / (1 + e))


def _gauss(z: Array) -> Array:
    """The standard normal distribution's function; by erfc, which does not cancel."""
    tails = [math.erfc(t) for t in (-z / math.sqrt(2)).ravel().tolist()]
    return 0.5 * np.array(tails, np.float64).reshape(z.shape)


def _gauss_density(z: Array) -> Array:
    return np.asarray(np.exp(-z * z / 2) / math.sqrt(2 * math.pi))


# relu 0 at 0; leaky_relu p at 0; relu6 0 at 0 and 6; elu p at 0; hardswish 0 at -3 and 1 at 3.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(
        lambda z, p: np.maximum(z, 0),
        lambda z, p: np.where(z > 0, 1.0, 0.0),
    ),
    "leaky_relu": Activation(
        lambda z, p: np.where(z > 0, z, p * z),
        lambda z, p: np.where(z > 0, 1.0, p),
        default=0.01,
    ),
    "relu6": Activation(
        lambda z, p: np.minimum(np.maximum(z, 0), 6),
        lambda z, p: np.where((z > 0) & (z < 6), 1.0, 0.0),
    ),
    "silu": Activation(
        lambda z, p: z * _sigmoid(z),
        lambda z, p: _sigmoid(z) * (1 + z * _sigmoid(-z)),
    ),
    "gelu": Activation(
        lambda z, p: z * _gauss(z),
        lambda z, p: _gauss(z) + z * _gauss_density(z),
    ),
    "elu": Activation(
        lambda z, p: np.where(z > 0, z, p * np.expm1(np.minimum(z, 0))),
        lambda z, p: np.where(z > 0, 1.0, p * np.exp(np.minimum(z, 0))),
        default=1.0,
    ),
    "hardswish": Activation(
        lambda z, p: z * np.minimum(np.maximum(z + 3, 0), 6) / 6,
        lambda z, p: np.where(z <= -3, 0.0, np.where(z < 3, (2 * z + 3) / 6, 1.0)),
    ),
    "sigmoid": Activation(
        lambda z, p: _sigmoid(z),
        lambda z, p: _sigmoid(z) * _sigmoid(-z),
    ),
    "tanh": Activation(
        lambda z, p: np.tanh(z),
        lambda z, p: 1 / np.square(np.cosh(z)),
    ),
}


def parameter(activation: str | None, given: float | None = None) -> float:
    """`given`, or what stands for None; 0 where the activation has no parameter.

    Raises:
        ValueError: the activation is not known, or has no parameter and one is given.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"no activation is called {activation}")
    default = None if activation is None else ACTIVATIONS[activation].default
    if given is not None and default is None:
        raise ValueError(f"{activation} has no parameter")
    return next((p for p in (given, default) if p is not None), 0.0)


def value(z: ArrayLike, activation: str | None, activation_param: float | None = None) -> Array:
    """f(z) for z of any shape, in float64; z itself for None. Raises ValueError as `parameter` does."""
    p, z = parameter(activation, activation_param), np.asarray(z, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return z if activation is None else ACTIVATIONS[activation].value(z, p)


def slope(z: ArrayLike, activation: str | None, activation_param: float | None = None) -> Array:
    """f'(z) for z of any shape, in float64; one for None. Raises ValueError as `parameter` does."""
    p, z = parameter(activation, activation_param), np.asarray(z, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.ones_like(z) if activation is None else ACTIVATIONS[activation].slope(z, p)


def affine(
    x: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    eps: float,
    residual: ArrayLike | None = None,
) -> Array:
    """z, what the activation is taken of: `reference.forward` of the same arguments, plus the residual.

    Raises:
        ValueError: a shape does not fit; that of the residual is x's, nothing is broadcast.
    """
    z = reference.forward(x, weight, bias, mean, var, eps)
    if residual is None:
        return z
    added = np.asarray(residual, np.float64)
    if added.shape != z.shape:
        raise ValueError(f"the residual has shape {added.shape}, the input {z.shape}")
    return z + added


def forward(
    x: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    eps: float,
    activation: str | None = None,
    activation_param: float | None = None,
    residual: ArrayLike | None = None,
) -> Array:
    """y = f(z) for the z of `affine`; x and the residual are (N, C, *), the others (C,).

    Raises:
        ValueError: a shape does not fit, or the activation does not.
    """
    z = affine(x, weight, bias, mean, var, eps, residual)
    return value(z, activation, activation_param)


def backward(
    dy: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    eps: float,
    training: bool,
    activation: str | None = None,
    activation_param: float | None = None,
    residual: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Gradients of a scalar loss, from its gradient `dy` with respect to y = f(z).

    By the chain rule dz = dy * f'(z), which is the residual's gradient, for it is added; from there on it is
    `reference.backward`. Unlike there, z is needed and with it the bias.

    Returns:
        dx (N, C, *), dweight (C,), dbias (C,), dresidual (N, C, *), all float64; the last is dz, whether or not a
        residual was added.
    Raises:
        ValueError: a shape does not fit, or the activation does not.
    """
    z = affine(x, weight, bias, mean, var, eps, residual)
    dy = np.asarray(dy, np.float64)
    if dy.shape != z.shape:
        raise ValueError(f"the gradient has shape {dy.shape}, the input {z.shape}")
    dz = dy * slope(z, activation, activation_param)
    return *reference.backward(dz, x, weight, mean, var, eps, training), dz
