"""What the float64 reference says of one batch normalization, and how far off a result may be.

The reference sees the stored values (a bfloat16 input is rounded first, then widened), so the bounds of tolerances.py,
activation_tolerances.py and inplace_tolerances.py cover the arithmetic and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import activation_tolerances
import inplace_tolerances
import tolerances
from bnext import reference, reference_activations

Array = NDArray[np.float64]


def numpy(tensor: Tensor) -> Array:
    """The exact values in float64."""
    values: Array = tensor.detach().to("cpu", torch.float64).numpy()
    return values


DIFFERENTIABLE = ("x", "weight", "bias", "residual")


@dataclass(repr=False)
class Judged:
    """Arguments of one call, the gradient that comes back to it, and the checks of all results."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch: bool
    momentum: float | None = 0.1
    eps: float = 1e-5
    unbiased: bool = True
    skip_nonfinite: bool = False
    activation: str | None = None
    activation_param: float | None = None
    residual: Tensor | None = None
    inplace: bool = False
    # The running statistics before the call, which moves them.
    old_mean: Array | None = field(init=False)
    old_var: Array | None = field(init=False)

    def __post_init__(self) -> None:
        self.old_mean = None if self.running_mean is None else numpy(self.running_mean).copy()
        self.old_var = None if self.running_var is None else numpy(self.running_var).copy()

    @cached_property
    def input(self) -> Array:
        return numpy(self.x)

    @cached_property
    def statistics(self) -> tuple[Array, Array]:
        """What the input is normalised with."""
        if self.batch:
            return reference.statistics(self.input)
        assert self.old_mean is not None and self.old_var is not None
        return self.old_mean, self.old_var

    def _channels(self, values: Array) -> Array:
        return values.reshape((1, -1) + (1,) * (self.x.dim() - 2))

    def _parameter(self, tensor: Tensor | None, default: float) -> Array:
        values = np.full(self.x.shape[1], default) if tensor is None else numpy(tensor)
        return self._channels(values)

    @cached_property
    def _terms(self) -> tuple[Array, Array, Array]:
        """xhat, and mean and invstd shaped to broadcast against it."""
        mean, var = self.statistics
        xhat = reference.forward(self.input, None, None, mean, var, self.eps)
        return xhat, self._channels(mean), self._channels(1 / np.sqrt(var + self.eps))

    @property
    def scale(self) -> tuple[Array, Array]:
        """mean, and weight * invstd: z is (x - mean) * scale + bias."""
        _, mean, invstd = self._terms
        return mean, self._parameter(self.weight, 1) * invstd

    @cached_property
    def affine(self) -> tuple[Array, Array]:
        """What the activation is taken of, and how far off it may be before it is stored."""
        xhat, mean, invstd = self._terms
        weight, bias = self._parameter(self.weight, 1), self._parameter(self.bias, 0)
        error = tolerances.affine(xhat, weight, bias, mean, invstd, self.x.dtype)
        z = xhat * weight + bias
        if self.residual is None:
            return z, error
        z = z + numpy(self.residual)
        return z, tolerances.added(z, error, self.x.dtype)

    @property
    def _activation(self) -> tuple[str | None, float | None]:
        return self.activation, self.activation_param

    @property
    def _forward_arguments(self) -> dict[str, Any]:
        """Of the reference."""
        mean, var = self.statistics
        optional = ("weight", "bias", "residual")
        return {
            "x": self.input,
            **{n: None if getattr(self, n) is None else numpy(getattr(self, n)) for n in optional},
            "mean": mean,
            "var": var,
            "eps": self.eps,
            "activation": self.activation,
            "activation_param": self.activation_param,
        }

    @cached_property
    def _output(self) -> tuple[Array, Array]:
        """y of the reference, and how far off it may be."""
        expected = reference_activations.forward(**self._forward_arguments)
        error = activation_tolerances.value_error(*self.affine, *self._activation, self.x.dtype)
        return expected, tolerances.output(expected, error, self.x.dtype)

    def check_output(self, y: Tensor) -> None:
        assert y.dtype == self.x.dtype
        tolerances.assert_within(y, *self._output, "y")

    @cached_property
    def gradients(self) -> tuple[Array, Array, Array, Array]:
        """dx, dweight, dbias and dresidual of the reference."""
        return reference_activations.backward(numpy(self.dy), training=self.batch, **self._forward_arguments)

    @cached_property
    def _dz(self) -> tuple[Array, Array]:
        """The gradient at the activation's input, and how far off it may be."""
        dy = numpy(self.dy)
        dz = dy * reference_activations.slope(self.affine[0], *self._activation)
        error = (inplace_tolerances if self.inplace else activation_tolerances).dz_error
        return dz, error(dy, *self.affine, *self._activation, self.x.dtype)

    @cached_property
    def _xhat_error(self) -> Array | float:
        """How far off the normalised input may be in backward, beyond the arithmetic of `tolerances`."""
        if not self.inplace:
            return 0.0
        error = inplace_tolerances.z_error(*self.affine, *self._activation, self.x.dtype)
        return error / np.abs(self._parameter(self.weight, 1))

    @cached_property
    def _input_grad(self) -> tuple[Array, Array]:
        """dx of the reference, and how far off it may be."""
        xhat, mean, invstd = self._terms
        (dz, error), expected, (_, scale) = self._dz, self.gradients[0], self.scale
        bound = tolerances.input_grad(
            expected, dz, xhat, scale, mean, invstd, self.batch, self.x.dtype, error, self._xhat_error
        )
        return expected, bound

    def check_input_grad(self, dx: Tensor) -> None:
        assert dx.dtype == self.x.dtype
        tolerances.assert_within(dx, *self._input_grad, "dx")

    def check_weight_grad(self, dweight: Tensor) -> None:
        xhat, mean, invstd = self._terms
        (dz, error), expected = self._dz, self.gradients[1]
        bound = tolerances.weight_grad(
            expected,
            dz,
            xhat,
            mean.ravel(),
            invstd.ravel(),
            dweight.dtype,
            self.x.dtype,
            error,
            self._xhat_error,
        )
        tolerances.assert_within(dweight, expected, bound, "dweight")

    def check_bias_grad(self, dbias: Tensor) -> None:
        dz, error = self._dz
        bound = tolerances.bias_grad(self.gradients[2], dz, dbias.dtype, self.x.dtype, error)
        tolerances.assert_within(dbias, self.gradients[2], bound, "dbias")

    def check_residual_grad(self, dresidual: Tensor) -> None:
        dz, error = self._dz
        assert dresidual.dtype == self.x.dtype
        bound = tolerances.residual_grad(dz, self.x.dtype, error)
        tolerances.assert_within(dresidual, self.gradients[3], bound, "dresidual")

    def check_grads(self) -> None:
        """The `grad` of every tensor that requires one, in its own dtype."""
        checks = (
            self.check_input_grad,
            self.check_weight_grad,
            self.check_bias_grad,
            self.check_residual_grad,
        )
        for name, check in zip(DIFFERENTIABLE, checks, strict=True):
            tensor = getattr(self, name)
            if tensor is not None and tensor.requires_grad:
                assert tensor.grad is not None, f"no gradient of {name}"
                assert tensor.grad.dtype == tensor.dtype
                check(tensor.grad)

    def check_running(self, momentum: float) -> None:
        """The running statistics after one training call, where `momentum` is the weight the batch should have."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.old_mean is not None and self.old_var is not None
        mean, var = reference.statistics(self.input)
        count = self.x.numel() // self.x.shape[1]
        new_mean, new_var = reference.running_update(
            self.old_mean, self.old_var, mean, var, count, momentum, self.unbiased
        )
        var = var * count / (count - 1)
        stored, dtype = self.running_mean.dtype, self.x.dtype
        bound = tolerances.running_mean(new_mean, self.old_mean, mean, var, momentum, stored, dtype)
        tolerances.assert_within(self.running_mean, new_mean, bound, "running_mean")
        bound = tolerances.running_var(new_var, self.old_var, var, momentum, stored, dtype)
        tolerances.assert_within(self.running_var, new_var, bound, "running_var")
