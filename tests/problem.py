"""One batch normalization to be solved: made from a line of the test matrix, run by bnext, judged by the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bnext
from cases import BOTH, LAYOUT, Active, Dtypes, Layout, Mode
from judged import DIFFERENTIABLE, Judged


@dataclass(repr=False)
class Problem(Judged):
    """The arguments of `Judged`, and the call."""

    def __repr__(self) -> str:
        given = [
            name for name in ("weight", "bias", "running_mean", "residual") if getattr(self, name) is not None
        ]
        return (
            f"Problem({tuple(self.x.shape)}, strides={self.x.stride()}, {self.x.dtype}, {given}, batch={self.batch}, "
            f"momentum={self.momentum}, eps={self.eps}, unbiased={self.unbiased}, "
            f"activation={self.activation}, activation_param={self.activation_param}, inplace={self.inplace})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of an example."""
        printer.text(repr(self))

    def forward(self) -> Tensor:
        """y; with `inplace` it is written over a copy of x."""
        return bnext.functional.batch_norm(
            self.copied() if self.inplace else self.x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.batch,
            self.momentum,
            self.eps,
            unbiased_running_var=self.unbiased,
            skip_nonfinite=self.skip_nonfinite,
            activation=self.activation,
            activation_param=self.activation_param,
            residual=self.residual,
            inplace=self.inplace,
        )

    def copied(self) -> Tensor:
        """x, computed from x, in memory like x's: with its strides, its alignment and what lies around it."""
        memory = self.x.detach().untyped_storage().clone()
        copy = self.x.detach().new_empty(0)
        copy.set_(memory, self.x.storage_offset(), self.x.shape, self.x.stride())
        return copy.copy_(self.x)

    def require_grad(self, *names: str) -> list[Tensor]:
        """Ask for the gradients of those of DIFFERENTIABLE that exist, or of the named of them."""
        wanted = [getattr(self, name) for name in names or DIFFERENTIABLE]
        return [tensor.requires_grad_() for tensor in wanted if tensor is not None]

    def step(self) -> list[Tensor]:
        """Everything a training step leaves behind: y, all gradients and the running statistics."""
        leaves = self.require_grad()
        y = self.forward()
        gradients = torch.autograd.grad(y, leaves, self.dy)
        assert self.running_mean is not None and self.running_var is not None
        return [y.detach(), *gradients, self.running_mean, self.running_var]


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
    active: Active | None,
    shape: tuple[int, ...],
    layout: Layout,
    dtypes: Dtypes,
    mode: Mode,
    parameters: tuple[str, ...] = BOTH,
    *,
    device: str = "cpu",
    residual: Layout | None = None,
    inplace: bool = False,
) -> Problem:
    """The same behind an activation, with a residual that lies in memory as `residual` says.

    Weights from small ones to 6 reach every piece of the activation, and where it saturates.
    """
    problem = make(shape, layout, dtypes, mode, parameters, device=device)
    if problem.weight is not None:
        problem.weight *= torch.linspace(0.5, 4, shape[1], device=device)
    if active is not None:
        problem.activation, problem.activation_param = active.activation, active.activation_param
    if residual is not None:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
        problem.residual = residual.arrange(values.to(device, dtypes.input))
    problem.inplace = inplace
    return problem


def joined(
    active: Active | None,
    shape: tuple[int, ...],
    layout: Layout | str,
    dtypes: Dtypes,
    mode: Mode,
    parameters: tuple[str, ...] = BOTH,
    *,
    device: str = "cpu",
    residual: Layout | None = None,
) -> Problem:
    """With a residual, laid out like x unless told otherwise."""
    layout = LAYOUT[layout] if isinstance(layout, str) else layout
    return make_active(
        active, shape, layout, dtypes, mode, parameters, device=device, residual=residual or layout
    )
