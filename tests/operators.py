"""The operators, and their arguments for a problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from problem import Problem

FORWARD = torch.ops.bnext.batch_norm.default
NO_UPDATE = torch.ops.bnext.batch_norm_no_update.default
INPLACE = torch.ops.bnext.batch_norm_.default
BACKWARD = torch.ops.bnext.batch_norm_backward.default
PHASES = torch.ops.bnext


def moments_of(x: Tensor, eps: float = 1e-5, **tensors: Tensor) -> Tensor:
    """With these of the tensors that it checks."""
    names = ("residual", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return PHASES.moments(x, *(tensors.get(name) for name in names), eps, None, None)


def forward_arguments(
    problem: Problem, momentum: float | None = 0.1, for_backward: bool = False, keeps_input: bool = True
) -> tuple[Any, ...]:
    counter = torch.tensor(2, device=problem.x.device) if problem.batch else None
    return (
        problem.x,
        problem.residual,
        problem.weight,
        problem.bias,
        problem.running_mean,
        problem.running_var,
        counter,
        problem.batch,
        momentum,
        problem.eps,
        True,
        [],
        problem.activation,
        problem.activation_param,
        for_backward,
        False,  # skip_nonfinite
        keeps_input,
    )


def no_update_arguments(problem: Problem, for_backward: bool = False) -> tuple[Any, ...]:
    x, residual, weight, bias, mean, var, _, training, _, eps, *_ = forward_arguments(problem)
    last = [], problem.activation, problem.activation_param, for_backward
    return x, residual, weight, bias, mean, var, training, eps, *last


def inplace_arguments(problem: Problem) -> tuple[Any, ...]:
    """Over a copy of x."""
    _, _, *others = forward_arguments(problem)[:-1]
    return problem.copied(), *others


def backward_arguments(
    problem: Problem, wanted: tuple[bool, ...] = (True, True, True), keeps_input: bool = True
) -> tuple[Any, ...]:
    """What autograd passes on: dresidual comes last in `wanted`, and may be left out."""
    p, x, residual, mask = problem, problem.x, problem.residual, None
    with torch.no_grad():
        if p.inplace:
            arguments = inplace_arguments(p)
            x, stats = arguments[0], INPLACE(*arguments)
        else:
            _, stats, mask = FORWARD(*forward_arguments(p, for_backward=True, keeps_input=keeps_input))
    if mask is not None and not mask.numel():
        mask = None
    if mask is not None or p.activation is None:
        residual = None
    activation = p.activation, p.activation_param
    output_mask = [*wanted, *[False] * (4 - len(wanted))]
    return p.dy, x, residual, mask, p.weight, p.bias, stats, p.batch, *activation, p.inplace, output_mask
