"""Batch normalization with the statistics of all processes of a group: the phases' operators, collectives between them.

Forward gathers 2 C + 1 numbers of each process, backward adds up 2 C, all float64. How many elements a process holds
travels with its statistics, so that nothing waits for the device to know it, and a process may hold none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .torch_activations import to_module

__all__ = ["Running", "batch_norm"]

_phases = torch.ops.bnext


class Running(NamedTuple):
    """Running statistics and how they take a batch's; see :func:`bnext.functional.batch_norm`."""

    mean: Tensor | None
    var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    unbiased: bool

    def update(self, moments: Tensor, count: Tensor) -> None:
        """By moments (2, C) of count elements, 0-d. Of 0 the counter goes up and the statistics stay as they are."""
        factor: Tensor | float = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1 / self.num_batches_tracked.double()
        if self.mean is None or self.var is None or (isinstance(factor, float) and factor == 0):
            return
        mean, var = moments.unbind()
        if self.unbiased:
            var = var * (count / (count - 1).clamp(min=1))
        for running, batch in ((self.mean, mean), (self.var, var)):
            old = running.double()
            running.copy_(torch.where(count > 0, (1 - factor) * old + factor * batch, old))


def _merged(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (2, C) and count, 0-d, of all from those of each: (processes, 2 C + 1), means, biased variances, count.

    In the order of ranks, and around the mean of the largest part, so that a constant is exactly its own mean (Chan,
    Golub, LeVeque, "Updating formulae and a pairwise algorithm", 1979, for many parts at once).
    """
    channels = parts.shape[1] // 2
    means, variances, counts = torch.split(parts, [channels, channels, 1], dim=1)
    count = counts.sum()
    share = counts / count.clamp(min=1)
    origin = means.index_select(0, counts.argmax(0))
    mean = origin + (share * (means - origin)).sum(0, keepdim=True)
    variance = (share * (variances + (means - mean) ** 2)).sum(0, keepdim=True)
    return torch.cat([mean, variance]), count


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(processes, n) of the n numbers of each."""
    size = dist.get_world_size(group)
    parts = part.new_empty(size * part.numel())
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # from torch 2.13 on
    all_gather(parts, part, group=group)
    return parts.view(size, part.numel())


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1]


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


class _Call(NamedTuple):
    """What has no gradient."""

    eps: float
    activation: str | None
    activation_param: float | None
    group: dist.ProcessGroup
    differentiable: bool


class _Kept(NamedTuple):
    """For backward. slope: y's by its activation's input, where a mask tells it."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    slope: Tensor | None
    total: Tensor  # elements of a channel in all processes, 0-d


def _composed(kept: _Kept, call: _Call) -> Tensor:
    """y in torch's operations, which can be differentiated again and again; with a slope, what has y's derivatives."""
    x = kept.x.double() if kept.x.dtype == torch.float64 else kept.x.float()
    dims = [d for d in range(x.dim()) if d != 1]

    def along(vector: Tensor) -> Tensor:
        return vector.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))

    mean = _sum(x.sum(dims), call.group) / kept.total
    centered = x - along(mean)
    var = _sum((centered * centered).sum(dims), call.group) / kept.total
    z = centered * along((var + call.eps).rsqrt())
    if kept.weight is not None:
        z = z * along(kept.weight)
    if kept.bias is not None:
        z = z + along(kept.bias)
    if kept.residual is not None:
        z = z + kept.residual.to(x.dtype)
    if kept.slope is not None:
        z = z * kept.slope
    elif call.activation is not None:
        z = to_module(call.activation, call.activation_param)(z)
    return z.to(kept.x.dtype)


def _composed_grads(kept: _Kept, call: _Call, dy: Tensor, wants: tuple[bool, ...]) -> Iterator[Tensor | None]:
    """Of x, residual, weight and bias, where they are wanted, in a graph."""
    if kept.residual is None and wants[1]:  # what it was is in the slope, or does not matter
        kept = kept._replace(residual=torch.zeros_like(kept.x, requires_grad=True))
    wanted = [t for t, wants_it in zip(kept[:4], wants, strict=True) if wants_it and t is not None]
    found = iter(torch.autograd.grad(_composed(kept, call), wanted, dy, create_graph=True))
    for wants_it in wants:
        yield next(found) if wants_it else None


class _Normalize(torch.autograd.Function):
    """y by moments (2, C) of count elements, 0-d; backward with the sums of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Tensor,
        count: Tensor,
        call: _Call,
    ) -> Tensor:
        activation = (call.activation, call.activation_param)
        y, stats, mask = _phases.normalize.default(
            x, residual, weight, bias, moments, call.eps, *activation, call.differentiable
        )
        if call.differentiable:
            needed = residual if call.activation is not None and mask.numel() == 0 else None
            ctx.call = call
            ctx.save_for_backward(x, needed, weight, bias, stats, mask, count)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias, stats, mask, count = ctx.saved_tensors
        call: _Call = ctx.call
        (dy,), activation = grads, (call.activation, call.activation_param)
        wants = ctx.needs_input_grad[:4]
        mask = mask if mask.numel() else None
        given = (
            x,
            residual,
            mask,
            None if weight is None else stats[2],
            None if bias is None else stats[3],
            stats,
        )
        if torch.is_grad_enabled():
            slope = None
            if mask is not None:
                ones, none = torch.ones_like(x), stats.new_zeros(x.shape[1], 2)
                with torch.no_grad():
                    slope = _phases.input_grad.default(ones, *given, none, *activation, [False, True])[1]
            return (
                *_composed_grads(_Kept(x, residual, weight, bias, slope, count), call, dy, wants),
                *[None] * 3,
            )
        sums, dweight, dbias = _phases.grad_sums.default(dy, *given, *activation)
        dist.all_reduce(sums, group=call.group)  # whatever this process wants itself
        sums = sums * (_count(x) / count.clamp(min=1))
        dx, dresidual = _phases.input_grad.default(
            dy, *given, sums, *activation, [wants[0], wants[1] and call.activation is not None]
        )
        if call.activation is None:
            dresidual = dy
        return (
            dx if wants[0] else None,
            dresidual if wants[1] else None,
            dweight.to(weight.dtype).view_as(weight) if wants[2] else None,
            dbias.to(bias.dtype).view_as(bias) if wants[3] else None,
            *[None] * 3,
        )


def batch_norm(
    input: Tensor,
    running: Running,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: dist.ProcessGroup,
    *,
    activation: str | None = None,
    activation_param: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`bnext.functional.batch_norm` in training, with mean and variance over the inputs of all processes.

    Every process of the group has to call it, in the same order, with input of the same C and dtype and any sizes
    besides, the batch's 0 included; and to call backward, if any does. Gradients of input and residual are those of the
    sum of all processes' losses; those of weight and bias are this process's part, as DistributedDataParallel expects.

    Args:
        input: (N, C, ...) of float32, float64, bfloat16 or float16.
        running: updated in the same way by every process.
        weight, bias: (C,) or None.
        eps: added to the variance; positive.
        group: of a backend that has all_gather and all_reduce of float64: gloo, NCCL.
        activation, activation_param, residual: as there.

    Returns:
        (N, C, ...) of the input's dtype.

    Raises:
        The errors of that function, but for one value per channel, which nobody knows beforehand to be all there are:
        its variance is 0, and so is what the running one takes. Other processes then wait for this one until their
        backend's timeout.
    """
    with torch.no_grad():
        moments = _phases.moments.default(input)
        count = moments.new_full((1,), _count(input))
        moments, total = _merged(_gathered(torch.cat([moments.flatten(), count]), group))
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, residual, weight, bias)
    )
    call = _Call(eps, activation, activation_param, group, differentiable)
    output: Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
        input, residual, weight, bias, moments, total, call
    )
    with torch.no_grad():
        running.update(moments, total)
    return output
