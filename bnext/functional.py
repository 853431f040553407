"""The function behind the modules. It calls the whole operators; batching.py does so too, for many examples at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C
from .arguments import require
from .holding import are_held
from .inference import by_torch, not_written

__all__ = ["ACTIVATIONS", "batch_norm", "check_activation"]

ACTIVATIONS = _C.ACTIVATIONS
WITH_PARAMETER = _C.WITH_PARAMETER

_TYPES = [(a.name, str(a.type)) for a in torch.ops.bnext.batch_norm.default._schema.arguments]


def check_activation(activation: str | None, activation_param: float | None, inplace: bool = False) -> None:
    """The operators' own check of an activation, for callers that have no input yet.

    Raises:
        TypeError: an activation that is no name, a parameter that is no number.
        ValueError: not one of ACTIVATIONS or None; a parameter for one that has none, or that is not finite; with
            inplace, one that cannot be inverted.
    """
    require("activation", activation, "Optional[str]")
    require("activation_param", activation_param, "Optional[float]")
    require("inplace", inplace, "bool")
    _C.check_activation(activation, None if activation_param is None else float(activation_param), inplace)


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
    activation: str | None = None,
    activation_param: float | None = None,
    residual: Tensor | None = None,
    inplace: bool = False,
    skip_nonfinite: bool = False,
    _ndims: Sequence[int] = (),
) -> Tensor:
    r"""Batch normalization over every dimension but 1, as :func:`torch.nn.functional.batch_norm`, and what follows it.

    .. math::
        z = (x - \mathrm{mean}) / \sqrt{\mathrm{var} + \mathrm{eps}} \cdot \mathrm{weight} + \mathrm{bias}
        + \mathrm{residual}, \qquad y = \mathrm{activation}(z)

    z is neither rounded to the input's dtype nor kept: backward computes it again from the input. Beside the input and
    a few numbers per channel it needs, with a residual, one bit per element for relu, leaky_relu and relu6, the
    residual for the other activations, and nothing without an activation. In inference with a weight that requires no
    grad it needs no input but for those other activations.

    Sums are float64 for float64 input. float32 input is summed in float32 over 8 elements, 16-bit input over a few
    dozen, around a center near the mean, and then in float64, as is all that follows per channel (Ioffe & Szegedy,
    "Batch Normalization", 2015, algorithms 1 and 2).

    Derivatives are of any order, backward, forward and of one in the other; torch.vmap normalises all examples at once,
    each with running statistics of its own if they are to be updated.

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
        activation: one of :data:`ACTIVATIONS`, by its name in torch.nn.functional, or None. gelu is the erf form.
        activation_param: negative slope of leaky_relu (None: 0.01), alpha of elu (None: 1.0).
        residual: (N, C, ...) or None, added before the activation; of the input's size, dtype and device, with any
            strides. It may be the input itself. Without an activation its gradient is that of the output, the same
            tensor.
        inplace: write the output over the input, as torch's in-place operations do, and keep that alone for backward,
            which recovers the normalised input from it: ``(z - bias) / weight`` with the z that y is the activation
            of. It is then off by the rounding of y to its dtype times ``|z / weight|``, and by more where the
            activation is flat. Without an activation, or with leaky_relu or elu of a positive parameter.
        skip_nonfinite: in training, a channel of which a running statistic would become infinite or NaN keeps both as
            they are, instead of being spoilt for good: a step that a gradient scaler for float16 skips has often had
            such a batch. The batch counts all the same, also in the cumulative average, where it repeats the old value.

    Returns:
        (N, C, ...) of the input's dtype; with inplace the input itself.

    Raises:
        TypeError: an argument of another type, such as a list for a tensor.
        ValueError: fewer than two dimensions, no channel, one value per channel in training, bad eps, an unknown
            activation, a parameter for one that has none or that is not finite; inplace with a residual or with an
            activation that cannot be inverted.
        RuntimeError: a vector of another length, dtype or device; a residual of another size, dtype or device; no
            running statistics in inference; inplace on a leaf that requires grad or on memory that overlaps itself, and
            on the CPU with a weight of exactly 0 when a gradient will be asked for.
        NotImplementedError: an input that is not floating point; with inplace a second derivative, which would need the
            input that was overwritten, or one in forward mode.
    """
    if inplace and residual is not None:
        raise ValueError(
            "expected inplace=True without a residual: backward could not tell it from the normalised input"
        )
    if training and are_held():
        running_mean = running_var = num_batches_tracked = None
    compiling = torch.compiler.is_compiling()
    if compiling and inplace and not training:
        running_mean, running_var = not_written(running_mean), not_written(running_var)
    arguments = (
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
        activation,
        activation_param,
        False,  # for_backward: autograd sets it
        skip_nonfinite,
    )
    if inplace:
        try:
            torch.ops.bnext.batch_norm_.default(input, *arguments)
        except RuntimeError:  # of the types too, which take a third of a small call to look at
            _require_types(input, None, *arguments)
            raise
        return input
    # The same operator: 4 microseconds for a small batch, 10 by torch.ops, to which it leaves what only that reads.
    output = None if compiling else _C.batch_norm(input, residual, *arguments)
    if output is None:
        _require_types(input, residual, *arguments)
        if compiling and not training:
            vectors = (running_mean, running_var, weight, bias)
            output = by_torch(input, vectors, eps, _ndims, residual, activation, activation_param)
        state = (running_mean, running_var, num_batches_tracked)
        writes = training and any(one is not None for one in state)
        if output is None and compiling and not writes:  # which a graph could not see of the other operator
            same = (input, residual, weight, bias, running_mean, running_var, training, eps, _ndims)
            operator = torch.ops.bnext.batch_norm_no_update.default
            output = operator(*same, activation, activation_param, False)[0]
        elif output is None:
            output = torch.ops.bnext.batch_norm.default(input, residual, *arguments)[0]
    return output


def _require_types(*given: object) -> None:
    """Of the operator's arguments, in its order."""
    for (name, kind), argument in zip(_TYPES, given, strict=False):  # the last have their defaults
        require("input" if name == "x" else name, argument, kind)
