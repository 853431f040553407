"""Batch normalization with the statistics of all processes of a group: the phases' operators, collectives between them.

Forward gathers 2 C + 1 numbers of each process, backward adds up 2 C, all float64. How many elements a process holds
travels with its statistics, so that nothing waits for the device to know it, and a process may hold none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .layouts import format_of
from .sync_graph import Call, Inputs, derivatives

__all__ = ["Running", "batch_norm"]

_phases = torch.ops.bnext


class Running(NamedTuple):
    """Running statistics and how they take a batch's; see :func:`bnext.functional.batch_norm`."""

    mean: Tensor | None
    var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    unbiased: bool
    skip_nonfinite: bool

    def update(self, moments: Tensor, count: Tensor) -> None:
        """By moments (2, C) of count elements, 0-d. Of 0 the counter goes up and the statistics stay as they are."""
        factor: Tensor | float = 0.0 if self.momentum is None else float(self.momentum)
        if self.momentum is None and self.num_batches_tracked is not None:
            factor = 1 / (self.num_batches_tracked.reshape(()) + 1).double()
        if self.mean is not None and self.var is not None and not (isinstance(factor, float) and factor == 0):
            mean, var = moments.unbind()
            if self.unbiased:
                var = var * (count / (count - 1).clamp(min=1))
            pairs = ((self.mean, mean), (self.var, var))
            new = [((1 - factor) * r.double() + factor * b.view_as(r)).to(r.dtype) for r, b in pairs]
            moves = (count > 0).expand_as(mean)
            if self.skip_nonfinite:
                moves = moves & new[0].isfinite().view_as(mean) & new[1].isfinite().view_as(mean)
            for (running, _), value in zip(pairs, new, strict=True):
                running.copy_(torch.where(moves.view_as(running), value, running))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


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
    origin = torch.where(origin.isfinite(), origin, 0)
    mean = origin + (share * (means - origin)).sum(0, keepdim=True)
    around = torch.where(counts > 0, variances + (means - mean) ** 2, 0)  # 0 times infinity is no 0
    variance = (share * around).sum(0, keepdim=True)
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


class _Kept(NamedTuple):
    """For backward. residual: where there is an activation and no mask. total: elements of a channel, 0-d."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    stats: Tensor
    mask: Tensor
    total: Tensor

    def arguments(self) -> tuple[Tensor | None, ...]:
        """Of the phases, from x to stats."""
        return (
            self.x,
            self.residual,
            self.mask if self.mask.numel() else None,
            None if self.weight is None else self.stats[2],
            None if self.bias is None else self.stats[3],
            self.stats,
        )


def _kept(call: Call, x: Tensor, *others: Tensor | None) -> _Kept:
    """What was saved, with x in the order that it had: hooks may bring it back in another."""
    return _Kept(x.contiguous(memory_format=call.order), *others)  # type: ignore[arg-type]


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _gradients(dy: Tensor, kept: _Kept, call: Call, wants: tuple[bool, ...]) -> Grads:
    """By x, residual, weight and bias; by the residual only behind an activation."""
    arguments, activation = kept.arguments(), (call.activation, call.activation_param)
    dy = dy.contiguous(memory_format=format_of(kept.x))  # for both phases
    sums, dweight, dbias = _phases.grad_sums.default(dy, *arguments, *activation)
    dist.all_reduce(sums, group=call.group)  # whatever this process wants itself
    sums = sums * (_count(kept.x) / kept.total.clamp(min=1))
    wants_residual = wants[1] and call.activation is not None
    dx, dresidual = _phases.input_grad.default(dy, *arguments, sums, *activation, [wants[0], wants_residual])
    return (
        dx if wants[0] else None,
        dresidual if wants_residual else None,
        dweight.to(kept.weight.dtype).view_as(kept.weight) if kept.weight is not None and wants[2] else None,
        dbias.to(kept.bias.dtype).view_as(kept.bias) if kept.bias is not None and wants[3] else None,
    )


class _Gradients(torch.autograd.Function):
    """:func:`_gradients`, which have derivatives too."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, call: Call, wants: tuple[bool, ...], *kept: Tensor | None) -> Grads:
        ctx.call = call
        ctx.save_for_backward(dy, *kept)
        return _gradients(dy, _kept(call, *kept), call, wants)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, *tensors = ctx.saved_tensors
        call = ctx.call
        kept = _kept(call, *tensors)
        passes = None
        if kept.mask.numel():
            with torch.no_grad():
                ones, none = torch.ones_like(kept.x), kept.stats.new_zeros(kept.x.shape[1], 2)
                activation = (call.activation, call.activation_param)
                phase = _phases.input_grad.default
                passes = phase(ones, *kept.arguments(), none, *activation, [False, True])[1] == 1
        given = Inputs(dy, kept.x, kept.residual, kept.weight, kept.bias)
        by_dy, *rest = derivatives(given, call, kept.stats[0], kept.total, passes, cotangents)
        if passes is not None:
            rest[1] = None  # the mask has no derivative
        return by_dy, None, None, *rest, None, None, None


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
        call: Call,
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
        (dy,), call, wants = grads, ctx.call, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            found = _Gradients.apply(dy, call, wants, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        else:
            found = _gradients(dy, _kept(call, *ctx.saved_tensors), call, wants)
        dx, dresidual, dweight, dbias = found
        if wants[1] and call.activation is None:
            dresidual = dy
        return dx, dresidual, dweight, dbias, None, None, None


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

    Every process of the group has to call it, in the same order, with input of the same C and any sizes besides, the
    batch's 0 included; and to call backward, if any does. Gradients of input and residual are those of the sum of all
    processes' losses; those of weight and bias are this process's part, as DistributedDataParallel expects. They can be
    differentiated; then every process has to do that as well.

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
        The errors of that function, before this process waits for others, which then wait for it until their backend's
        timeout. One value per channel is none of them, as others may have more; if it is all there is, its variance
        counts as 0, in the running one too.
    """
    input = input.contiguous(memory_format=format_of(input))  # for all phases
    with torch.no_grad():
        tensors = (input, residual, weight, bias, running.mean, running.var, running.num_batches_tracked)
        moments = _phases.moments.default(*tensors, eps, activation, activation_param)
        count = moments.new_full((1,), _count(input))
        moments, total = _merged(_gathered(torch.cat([moments.flatten(), count]), group))
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, residual, weight, bias)
    )
    call = Call(eps, activation, activation_param, group, differentiable, format_of(input))
    output: Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
        input, residual, weight, bias, moments, total, call
    )
    with torch.no_grad():
        running.update(moments, total)
    return output
