"""Inference that is compiled or exported: torch's operators, which write nothing.

A compiler fuses them with what is around them and folds them into a convolution, and an exported program needs no
bnext. One that nobody compiles has the rounding errors of torch's batch norm on the CPU, which grow with mean / std.
Our operator stays with ``inplace``, without running statistics, where a batch's size is known to the run alone, and in
compiled code where a gradient will be asked for: it keeps less for backward, and no statistics, which may change by
then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _C
from .torch_activations import followed

__all__ = ["by_torch", "not_written"]

_HALF = (torch.bfloat16, torch.float16)
_SAME_AFTER_ROUNDING = (None, "relu", "relu6")
_Vectors = Sequence[Tensor | None]  # running_mean, running_var, weight, bias


def by_torch(
    input: Tensor,
    vectors: _Vectors,
    eps: float,
    ndims: Sequence[int],
    residual: Tensor | None,
    activation: str | None,
    activation_param: float | None,
) -> Tensor | None:
    """As :func:`bnext.functional.batch_norm` with running statistics, rounded to the input's dtype once.

    Returns:
        (N, C, ...) of the input's dtype; None of what torch's operators do not take, or do not refuse.
    """
    follows = (residual, activation, activation_param)
    given = [input, *(one for one in (residual, *vectors) if one is not None)]
    if _keeps_for_backward(given) or not (
        _is_taken(input, vectors, eps, ndims) and _is_followed(input, *follows)
    ):
        return None
    if input.dtype not in _HALF or (residual is None and activation in _SAME_AFTER_ROUNDING):
        return followed(_in_its_dtype(input, vectors, eps), *follows)
    wide = [None if one is None else one.float() for one in vectors]
    return followed(_in_its_dtype(input.float(), wide, eps), *follows).to(input.dtype)


def not_written(running: Tensor | None) -> Tensor | None:
    """A copy for the operator in place: a compiled graph takes what the schema lets it write as written, in eval too,
    and what an earlier graph kept of it for backward as spoilt."""
    return running.clone() if isinstance(running, Tensor) else running


def _in_its_dtype(input: Tensor, vectors: _Vectors, eps: float) -> Tensor:
    running_mean, running_var, weight, bias = vectors
    return F.batch_norm(input, running_mean, running_var, weight, bias, training=False, eps=eps)


def _keeps_for_backward(given: Sequence[Tensor]) -> bool:
    wanted = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    return wanted and not torch.compiler.is_exporting()


def _is_taken(input: Tensor, vectors: _Vectors, eps: float, ndims: Sequence[int]) -> bool:
    # Here, for it takes half a second that nobody needs who does not compile.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    given = [one for one in vectors if one is not None]
    if vectors[0] is None or vectors[1] is None or input.dim() < 2 or (ndims and input.dim() not in ndims):
        return False
    dtype = vectors[0].dtype
    return (
        guard_or_false(input.numel() > 0)  # torch's ask, of sizes that are not known before the graph runs
        and input.is_floating_point()
        and (dtype == input.dtype or (dtype == torch.float32 and input.dtype in _HALF))
        and all(one.dtype == dtype and one.shape == input.shape[1:2] for one in given)
        and all(one.device == input.device for one in given)
        and not (vectors[0].requires_grad or vectors[1].requires_grad)
        and eps >= 0
    )


def _is_followed(
    input: Tensor, residual: Tensor | None, activation: str | None, parameter: float | None
) -> bool:
    added = residual is None or (
        residual.shape == input.shape and residual.dtype == input.dtype and residual.device == input.device
    )
    known = activation is None or activation in _C.ACTIVATIONS
    return (
        added
        and known
        and (parameter is None or (activation in _C.WITH_PARAMETER and -math.inf < parameter < math.inf))
    )
