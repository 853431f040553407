"""Batch normalization in NumPy and float64: the specification that every kernel is tested against.

Slow and obvious on purpose. Arrays have the channel at axis 1; "a channel" is everything that shares an index
there, so a channel of an input of shape (N, C, *spatial) has n = N * prod(spatial) values. Per-channel arrays
have shape (C,).

The functions follow torch's conventions (momentum is the weight of the new value, the running variance may be
unbiased); the class `BatchNorm` follows the notebook this project began with (momentum is a decay, the
running variance is biased).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _as_input(x: ArrayLike, name: str = "input") -> Array:
    """`x` in float64, after checking that it has a channel axis."""
    array = np.asarray(x)
    if np.iscomplexobj(array):
        raise TypeError(f"{name} must be real, got {array.dtype}")
    if array.ndim < 2:
        raise ValueError(f"expected at least 2D {name} (got {array.ndim}D {name})")
    return array.astype(np.float64)


def _as_channels(values: ArrayLike, channels: int, name: str) -> Array:
    """A per-channel vector in float64, after checking its length."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (channels,):
        raise ValueError(f"{name} should have shape ({channels},), got {array.shape}")
    return array


def _along_channels(values: Array, x: Array) -> Array:
    """A per-channel vector shaped (1, C, 1, ...), so that it broadcasts against `x`."""
    return values.reshape((1, -1) + (1,) * (x.ndim - 2))


def _count(x: Array) -> int:
    """n, the values per channel."""
    return int(x.shape[0] * math.prod(x.shape[2:]))


def _by_channel(x: Array) -> Array:
    """`x` as (C, n), one contiguous row per channel, which NumPy sums pairwise (error grows as log2(n))."""
    return np.ascontiguousarray(np.moveaxis(x, 1, 0)).reshape(x.shape[1], _count(x))


def statistics(x: ArrayLike) -> tuple[Array, Array]:
    """Mean and biased variance of each channel.

        mean = sum(x) / n        var = sum((x - mean)^2) / n

    Args:
        x: (N, C, *), any real dtype, n >= 1 values per channel.
    Returns:
        mean, var: (C,) float64.
    Raises:
        ValueError: `x` has fewer than two axes, or its channels are empty.
    """
    rows = _by_channel(_as_input(x))
    if rows.shape[1] == 0:
        raise ValueError("an empty channel has no statistics")
    mean: Array = rows.mean(axis=1)
    with np.errstate(invalid="ignore"):  # what the sum lost by rounding, so that no error grows with mean/std
        lost = (rows - mean[:, None]).mean(axis=1)
    mean = mean + np.where(np.isfinite(lost), lost, 0)
    var: Array = np.square(rows - mean[:, None]).mean(axis=1)
    return mean, var


def forward(
    x: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    eps: float,
) -> Array:
    """Normalize each channel with the given statistics, then scale and shift it.

        xhat = (x - mean) / sqrt(var + eps)        y = weight * xhat + bias

    Args:
        x: (N, C, *), any real dtype.
        weight, bias: (C,), or None for one and zero.
        mean, var: (C,): `statistics(x)` in training, the running statistics in inference.
        eps: added to the variance, so that a constant channel does not divide by zero.
    Returns:
        y: float64, the shape of `x`.
    Raises:
        ValueError: a shape does not fit.
    """
    x = _as_input(x)
    y = _normalized(x, mean, var, eps)
    if weight is not None:
        y = y * _along_channels(_as_channels(weight, x.shape[1], "weight"), x)
    if bias is not None:
        y = y + _along_channels(_as_channels(bias, x.shape[1], "bias"), x)
    return y


def _normalized(x: Array, mean: ArrayLike, var: ArrayLike, eps: float) -> Array:
    channels = x.shape[1]
    centre = _along_channels(_as_channels(mean, channels, "mean"), x)
    spread = np.sqrt(_along_channels(_as_channels(var, channels, "var"), x) + eps)
    xhat: Array = (x - centre) / spread
    return xhat


def running_update(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    count: int,
    momentum: float,
    unbiased: bool = True,
) -> tuple[Array, Array]:
    """Move the running statistics towards those of a batch.

        running_mean <- (1 - momentum) * running_mean + momentum * mean
        running_var  <- (1 - momentum) * running_var  + momentum * var * n / (n - 1)

    The factor n / (n - 1) (Bessel) makes the variance unbiased; the notebook, Flax and Keras leave it out.

    Args:
        running_mean, running_var, mean, var: (C,); `var` is the biased variance of the batch.
        count: n, values per channel. An empty batch (0) changes nothing.
        momentum: weight of the new value. 0 changes nothing, whatever the batch holds.
        unbiased: whether Bessel's factor is applied.
    Returns:
        The new running_mean and running_var, float64; the arguments are left alone.
    Raises:
        ValueError: a shape does not fit, or an unbiased variance is asked of a single value.
    """
    channels = np.asarray(running_mean).size
    old_mean = _as_channels(running_mean, channels, "running_mean")
    old_var = _as_channels(running_var, channels, "running_var")
    if count == 0 or momentum == 0.0:
        return old_mean.copy(), old_var.copy()
    if unbiased and count == 1:
        raise ValueError("a single value per channel has no unbiased variance")
    new_var = _as_channels(var, channels, "var") * (count / (count - 1) if unbiased else 1.0)
    new_mean = _as_channels(mean, channels, "mean")
    return (1 - momentum) * old_mean + momentum * new_mean, (1 - momentum) * old_var + momentum * new_var


def backward(
    dy: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    eps: float,
    training: bool,
) -> tuple[Array, Array, Array]:
    """Gradients of a scalar loss, from its gradient `dy` with respect to y.

    Write s = 1 / sqrt(var + eps) and xhat = (x - mean) * s, so that y = weight * xhat + bias. In every mode

        dbias = sum(dy)        dweight = sum(dy * xhat)        dxhat = weight * dy

    In inference mean and s are constants, hence dx = dxhat * s. In training both depend on x:

        d mean / d x_i = 1/n
        d var  / d x_i = 2 (x_i - mean) / n
        d s    / d x_i = -s^3/2 * d var / d x_i = -s^2 xhat_i / n

    and d xhat_j/d x_i = s (delta_ij - 1/n) + (x_j - mean) d s / d x_i = s (delta_ij - (1 + xhat_j xhat_i)/n)
    Summed over j, each times dxhat_j:

        dx = s * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))

    Args:
        dy, x: (N, C, *), the same shape.
        weight: (C,), or None for one.
        mean, var, eps: what the forward pass used.
        training: whether mean and var are those of `x`.
    Returns:
        dx (shape of `x`), dweight (C,), dbias (C,), all float64; for an absent weight, dweight is taken at 1.
    Raises:
        ValueError: a shape does not fit.
    """
    x = _as_input(x)
    dy = _as_input(dy, "gradient")
    if dy.shape != x.shape:
        raise ValueError(f"the gradient has shape {dy.shape}, the input {x.shape}")
    channels = x.shape[1]
    xhat = _normalized(x, mean, var, eps)
    scale = np.ones(channels) if weight is None else _as_channels(weight, channels, "weight")
    s = 1 / np.sqrt(_as_channels(var, channels, "var") + eps)

    dbias: Array = _by_channel(dy).sum(axis=1)
    dweight: Array = _by_channel(dy * xhat).sum(axis=1)
    dxhat = _along_channels(scale, x) * dy
    if training and x.size:
        n = _count(x)
        mean_dxhat = scale * dbias / n
        mean_dxhat_xhat = scale * dweight / n
        dxhat = dxhat - _along_channels(mean_dxhat, x) - xhat * _along_channels(mean_dxhat_xhat, x)
    return _along_channels(s, x) * dxhat, dweight, dbias


class _Pass(NamedTuple):
    """What `BatchNorm.backward` needs of the forward pass it belongs to."""

    x: Array
    gamma: Array
    mean: Array
    var: Array
    training: bool


class BatchNorm:
    """The notebook's layer, with a backward pass and inputs of any rank.

        training:   y from the batch's statistics; running <- momentum * running + (1 - momentum) * batch,
                    where the batch's variance is the biased one
        inference:  y from the running statistics

    Args:
        num_features: C, the channels of the input.
        momentum: decay of the running statistics (torch's momentum is one minus this).
        epsilon: added to the variance.
    Attributes:
        gamma, beta: (C,), scale and shift.
        running_mean, running_var: (C,).
        training: the mode; True at first.
        dgamma, dbeta: (C,), set by `backward`.
    """

    def __init__(self, num_features: int, momentum: float = 0.9, epsilon: float = 1e-5) -> None:
        self.gamma: Array = np.ones(num_features)
        self.beta: Array = np.zeros(num_features)
        self.momentum = momentum
        self.epsilon = epsilon
        self.running_mean: Array = np.zeros(num_features)
        self.running_var: Array = np.ones(num_features)
        self.training = True
        self.dgamma: Array | None = None
        self.dbeta: Array | None = None
        self._pass: _Pass | None = None

    def forward(self, x: ArrayLike) -> Array:
        """y for `x` of shape (N, C, *); in training also moves the running statistics.

        Raises:
            ValueError: `x` has no channel axis, is empty in training, or has another number of channels than
                the layer; nothing has changed then.
        """
        x = _as_input(x)
        if x.shape[1] != self.gamma.size:
            raise ValueError(f"expected {self.gamma.size} channels at axis 1, got input of shape {x.shape}")
        mean, var = statistics(x) if self.training else (self.running_mean, self.running_var)
        y = forward(x, self.gamma, self.beta, mean, var, self.epsilon)
        if self.training:
            self.running_mean, self.running_var = running_update(
                self.running_mean, self.running_var, mean, var, _count(x), 1 - self.momentum, unbiased=False
            )
        # Copies, because callers update gamma and the running statistics in place.
        self._pass = _Pass(x, self.gamma.copy(), mean.copy(), var.copy(), self.training)
        return y

    def backward(self, dy: ArrayLike) -> Array:
        """dx for the last forward pass, in the mode it ran in; stores dgamma and dbeta.

        Raises:
            RuntimeError: there was no forward pass.
            ValueError: `dy` has another shape than the output.
        """
        if self._pass is None:
            raise RuntimeError("backward needs a forward pass before it")
        x, gamma, mean, var, training = self._pass
        dx, self.dgamma, self.dbeta = backward(dy, x, gamma, mean, var, self.epsilon, training)
        return dx
