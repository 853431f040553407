"""One batch normalization to be solved: made from a line of the test matrix, run by bnext, judged by the reference.

The reference sees the stored values (a bfloat16 input is rounded first, then widened), so the bounds of tolerances.py
cover the arithmetic and nothing else.
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
import bnext
import tolerances
from bnext import reference, reference_activations
from cases import BOTH, Active, Dtypes, Layout, Mode

Array = NDArray[np.float64]


def numpy(tensor: Tensor) -> Array:
    """The exact values in float64."""
    values: Array = tensor.detach().to("cpu", torch.float64).numpy()
    return values


@dataclass(repr=False)
class Problem:
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
    activation: str | None = None
    activation_param: float | None = None
    # The running statistics before the call, which moves them.
    old_mean: Array | None = field(init=False)
    old_var: Array | None = field(init=False)

    def __post_init__(self) -> None:
        self.old_mean = None if self.running_mean is None else numpy(self.running_mean).copy()
        self.old_var = None if self.running_var is None else numpy(self.running_var).copy()

    def __repr__(self) -> str:
        given = [name for name in ("weight", "bias", "running_mean") if getattr(self, name) is not None]
        return (
            f"Problem({tuple(self.x.shape)}, strides={self.x.stride()}, {self.x.dtype}, {given}, batch={self.batch}, "
            f"momentum={self.momentum}, eps={self.eps}, unbiased={self.unbiased}, "
            f"activation={self.activation}, activation_param={self.activation_param})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of an example."""
        printer.text(repr(self))

    def forward(self) -> Tensor:
        return bnext.functional.batch_norm(
            self.x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.batch,
            self.momentum,
            self.eps,
            unbiased_running_var=self.unbiased,
            activation=self.activation,
            activation_param=self.activation_param,
        )

    def require_grad(self, *names: str) -> list[Tensor]:
        """Ask for the gradients of "x", "weight", "bias" where they exist, of all of them when none is named."""
        wanted = [getattr(self, name) for name in names or ("x", "weight", "bias")]
        return [tensor.requires_grad_() for tensor in wanted if tensor is not None]

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
        return xhat * weight + bias, error

    @property
    def _activation(self) -> tuple[str | None, float | None]:
        return self.activation, self.activation_param

    def check_output(self, y: Tensor) -> None:
        expected = reference_activations.forward(
            self.input,
            None if self.weight is None else numpy(self.weight),
            None if self.bias is None else numpy(self.bias),
            *self.statistics,
            self.eps,
            *self._activation,
        )
        assert y.dtype == self.x.dtype
        error = activation_tolerances.value_error(*self.affine, *self._activation, self.x.dtype)
        bound = tolerances.output(expected, error, self.x.dtype)
        tolerances.assert_within(y, expected, bound, "y")

    @cached_property
    def gradients(self) -> tuple[Array, Array, Array]:
        """dx, dweight and dbias of the reference."""
        return reference_activations.backward(
            numpy(self.dy),
            self.input,
            None if self.weight is None else numpy(self.weight),
            None if self.bias is None else numpy(self.bias),
            *self.statistics,
            self.eps,
            self.batch,
            *self._activation,
        )

    @cached_property
    def _dz(self) -> tuple[Array, Array]:
        """The gradient at the activation's input, and how far off it may be."""
        dy = numpy(self.dy)
        dz = dy * reference_activations.slope(self.affine[0], *self._activation)
        return dz, activation_tolerances.dz_error(dy, *self.affine, *self._activation, self.x.dtype)

    def check_input_grad(self, dx: Tensor) -> None:
        xhat, mean, invstd = self._terms
        (dz, error), expected, (_, scale) = self._dz, self.gradients[0], self.scale
        assert dx.dtype == self.x.dtype
        bound = tolerances.input_grad(
            expected, dz, xhat, scale, mean, invstd, self.batch, self.x.dtype, error
        )
        tolerances.assert_within(dx, expected, bound, "dx")

    def check_weight_grad(self, dweight: Tensor) -> None:
        xhat, mean, invstd = self._terms
        (dz, error), expected = self._dz, self.gradients[1]
        bound = tolerances.weight_grad(
            expected, dz, xhat, mean.ravel(), invstd.ravel(), dweight.dtype, self.x.dtype, error
        )
        tolerances.assert_within(dweight, expected, bound, "dweight")

    def check_bias_grad(self, dbias: Tensor) -> None:
        dz, error = self._dz
        bound = tolerances.bias_grad(self.gradients[2], dz, dbias.dtype, self.x.dtype, error)
        tolerances.assert_within(dbias, self.gradients[2], bound, "dbias")

    def check_grads(self) -> None:
        """The `grad` of every tensor that requires one, in its own dtype."""
        checks = {"x": self.check_input_grad, "weight": self.check_weight_grad, "bias": self.check_bias_grad}
        for name, check in checks.items():
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


def make(
    shape: tuple[int, ...],
    layout: Layout,
    dtypes: Dtypes,
    mode: Mode,
    parameters: tuple[str, ...] = BOTH,
    *,
    device: str = "cpu",
    mean: float = 0.0,
) -> Problem:
    """A problem with well-conditioned random values: each channel has its own mean near `mean` and its own spread."""
    generator = torch.Generator().manual_seed(sum((i + 1) * size for i, size in enumerate(shape)))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape[1], generator=generator, dtype=torch.float64)

    def vector(values: Tensor, wanted: bool) -> Tensor | None:
        return values.to(device, dtypes.parameters) if wanted else None

    per_channel = (1, -1) + (1,) * (len(shape) - 2)
    centre = mean + uniform(-2, 2)
    values = normal(*shape) * uniform(0.5, 2).view(per_channel) + centre.view(per_channel)
    # Weights of both signs, none near zero: an error hides in a small product.
    weight = uniform(0.5, 1.5) * uniform(-1, 1).sign()
    return Problem(
        x=layout.arrange(values.to(device, dtypes.input)),
        dy=normal(*shape).to(device, dtypes.input),
        weight=vector(weight, "weight" in parameters),
        bias=vector(normal(shape[1]), "bias" in parameters),
        running_mean=vector(centre + 0.1 * normal(shape[1]), mode.tracked),
        running_var=vector(uniform(0.25, 4), mode.tracked),
        batch=mode.batch,
    )


def make_active(
    active: Active,
    shape: tuple[int, ...],
    layout: Layout,
    dtypes: Dtypes,
    mode: Mode,
    parameters: tuple[str, ...] = BOTH,
    *,
    device: str = "cpu",
) -> Problem:
    """The same behind an activation. Weights from small ones to 6 reach every piece of it, and where it saturates."""
    problem = make(shape, layout, dtypes, mode, parameters, device=device)
    if problem.weight is not None:
        problem.weight *= torch.linspace(0.5, 4, shape[1], device=device)
    problem.activation, problem.activation_param = active.activation, active.activation_param
    return problem
