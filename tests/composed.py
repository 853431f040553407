"""The function composed of torch's own operations: of elementary ones, and of its layers' functions one by one.

The elementary ones have derivatives of every order in either mode. torch's batch norm errs in the third order, and its
forward mode takes the batch's statistics for constants where it is differentiated again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnext.functional import batch_norm
from cases import Active, arguments_of
from problem import Problem

EPS = 1e-5


@dataclass(frozen=True)
class Form:
    """A call but for its tensors. running: mean and variance of a layer in eval, None in training."""

    active: Active | None
    running: tuple[Tensor, Tensor] | None

    def ours(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        given = arguments_of(self.active)
        return batch_norm(
            x,
            *(self.running or (None, None)),
            weight,
            bias,
            training=self.running is None,
            eps=EPS,
            activation=given[0],
            activation_param=given[1],
            residual=residual,
        )

    def composed(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        dims = [d for d in range(x.dim()) if d != 1]

        def along(v: Tensor) -> Tensor:
            return v.view(1, -1, *[1] * (x.dim() - 2))

        mean = x.mean(dims) if self.running is None else self.running[0]
        centered = x - along(mean)
        var = centered.square().mean(dims) if self.running is None else self.running[1]
        z = centered * along((var + EPS).rsqrt())
        z = z if weight is None else z * along(weight)
        z = z if bias is None else z + along(bias)
        z = z if residual is None else z + residual
        if self.active == Active("silu"):
            return z * z.sigmoid()  # torch's has no forward mode in backward, but under torch.func
        return z if self.active is None else self.active.of(z)


def elementary(problem: Problem) -> Tensor:
    """What a problem's activation is taken of, in elementary operations."""
    assert problem.eps == EPS
    running = None
    if not problem.batch:
        assert problem.running_mean is not None and problem.running_var is not None
        running = problem.running_mean, problem.running_var
    return Form(None, running).composed(problem.x, problem.weight, problem.bias, problem.residual)


def torchs_composition(problem: Problem, active: Active | None) -> Tensor:
    """torch's steps one by one. Vectors of 16 bits are widened, for its batch statistics are rounded to their dtype."""
    wide = torch.promote_types(problem.x.dtype, torch.float32)
    vectors = (problem.running_mean, problem.running_var, problem.weight, problem.bias)
    mean, var, weight, bias = (None if t is None else t.to(wide) for t in vectors)
    z = torch.nn.functional.batch_norm(problem.x, mean, var, weight, bias, problem.batch, 0.0, problem.eps)
    if problem.residual is not None:
        z = z + problem.residual
    return z if active is None else active.of(z)


def close(ours: object, expected: object) -> None:
    """Of float64, through a few derivatives."""
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
