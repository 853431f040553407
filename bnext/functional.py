"""The function behind the modules, and the only place that calls the operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    unbiased_running_var: bool = True,
    num_batches_tracked: Tensor | None = None,
    _ndims: Sequence[int] = (),
) -> Tensor:
    r"""Batch normalization over every dimension but 1, as :func:`torch.nn.functional.batch_norm`.

    .. math:: y = (x - \mathrm{mean}) / \sqrt{\mathrm{var} + \mathrm{eps}} \cdot \mathrm{weight} + \mathrm{bias}

    Statistics and their fold are float64 for float32 and float64 input; 16-bit input is summed in float32 over a few
    dozen elements, then in float64 (Ioffe & Szegedy, "Batch Normalization", 2015, algorithms 1 and 2).

    Args:
        input: (N, C, ...) of float32, float64, bfloat16 or float16. Contiguous, channels_last and channels_last_3d
            input is read as it lies and gives output and gradient of that layout; any other gives contiguous ones.
        running_mean: (C,) or None, updated in training: ``(1 - momentum) * running + momentum * batch``.
        running_var: (C,) or None, likewise.
        weight: (C,) or None. All vectors have the input's dtype, or all float32 beside a 16-bit input.
        bias: (C,) or None.
        training: normalise with the batch's statistics instead of the running ones.
        momentum: weight of the new value. 0 leaves the running statistics alone whatever the batch holds. None: the
            cumulative average, with ``1 / num_batches_tracked`` (0 without a counter).
        eps: added to the variance; positive in training.
        unbiased_running_var: the running variance takes ``var * n / (n - 1)`` as in torch; False takes the biased
            variance as Flax and Keras do.
        num_batches_tracked: int64 scalar or None, incremented in training by the same operator.

    Returns:
        (N, C, ...) of the input's dtype.

    Raises:
        ValueError: fewer than two dimensions, no channel, one value per channel in training, bad eps.
        RuntimeError: a vector of another length, dtype or device; no running statistics in inference.
        NotImplementedError: an input that is not floating point.
    """
    arguments = (
        input,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        momentum,
        eps,
        unbiased_running_var,
        _ndims,
    )
    # The same operator: 4 microseconds for a small batch, 10 by torch.ops, to which it leaves what only that can read.
    output = None if torch.compiler.is_compiling() else _C.batch_norm(*arguments)
    if output is None:
        output = torch.ops.bnext.batch_norm.default(*arguments)[0]
    return output
