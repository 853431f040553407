"""Derivatives of a synchronized layer's gradients: the layer in operations that have some, its collectives too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .torch_activations import to_module

__all__ = ["Call", "Inputs", "derivatives"]


class Call(NamedTuple):
    """What a call has besides tensors. differentiable: a backward may follow. order: of x, and of bits of the mask."""

    eps: float
    activation: str | None
    activation_param: float | None
    group: dist.ProcessGroup
    differentiable: bool
    order: torch.memory_format


class Inputs(NamedTuple):
    """What gradients have derivatives by. residual: where there is an activation."""

    dy: Tensor
    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Sum(torch.autograd.Function):
    """Over all processes. Each one's gradient is the sum of all gradients, as the objective is that of all losses."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grads[0], ctx.group), None


def _sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    total: Tensor = _Sum.apply(value, group)  # type: ignore[no-untyped-call]
    return total


def _composed(given: Inputs, call: Call, mean: Tensor, total: Tensor, passes: Tensor | None) -> Tensor:
    """y, or with what a mask says `passes`, what has y's derivatives.

    mean (C,) and total, 0-d, are those of the forward pass, without derivatives: distances are taken from the mean as
    x's arithmetic holds it, so that what the sums add to it is small.
    """
    x = given.x if given.x.dtype == torch.float64 else given.x.float()
    dims = [d for d in range(x.dim()) if d != 1]

    def along(vector: Tensor) -> Tensor:
        return vector.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))

    distance = x - along(mean)
    centered = distance - along(_sum(distance.sum(dims, dtype=torch.float64), call.group) / total)
    var = _sum((centered * centered).sum(dims, dtype=torch.float64), call.group) / total
    z = centered * along((var + call.eps).rsqrt())
    if given.weight is not None:
        z = z * along(given.weight)
    if given.bias is not None:
        z = z + along(given.bias)
    if given.residual is not None:
        z = z + given.residual.to(x.dtype)
    if call.activation is not None:
        module = to_module(call.activation, call.activation_param)
        z = (
            module(z)
            if passes is None
            else torch.where(passes, z, z * getattr(module, "negative_slope", 0.0))
        )
    return z.to(given.x.dtype)


def derivatives(
    given: Inputs,
    call: Call,
    mean: Tensor,
    total: Tensor,
    passes: Tensor | None,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """By all of `given`, of the sum of the gradients by x, residual, weight and bias, each times its cotangent.

    Every process of the group does the same whatever its tensors require, so that collectives meet. passes: where a
    mask stands for the residual, the elements whose gradient passes whole.
    """
    create_graph = torch.is_grad_enabled()

    def apart(t: Tensor | None) -> Tensor | None:
        """With no history that leads to another of them."""
        if t is None:
            return None
        return t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad():
        dy, *rest = (apart(t) for t in given)
        if passes is not None:
            rest[1] = torch.zeros_like(given.x, requires_grad=True)  # its value is in what passes
        composed = _composed(Inputs(dy, *rest), call, mean, total, passes)  # type: ignore[arg-type]
        inner = [t for t in rest if t is not None]
        first = torch.autograd.grad(composed, inner, dy, create_graph=True)
        of = [c for t, c in zip(rest, cotangents, strict=True) if t is not None]
        weights = [torch.zeros_like(f) if c is None else c for f, c in zip(first, of, strict=True)]
        outer = [t for t in (dy, *inner) if t is not None]
        second = torch.autograd.grad(first, outer, weights, create_graph=create_graph, allow_unused=True)
        found = iter(second)
        return [None if t is None else next(found) for t in (dy, *rest)]
