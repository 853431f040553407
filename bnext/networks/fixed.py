"""Layers without a class of torch's that normalize by fixed statistics, as torchvision's FrozenBatchNorm2d does."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad as fwAD

from ..drawn_in import DrawnIn, TakesDrawnIn, what_follows
from ..functional import batch_norm
from ..torch_activations import followed
from .formula import STATE, eps_of
from .fused_forward import can_stand_before, set_class

__all__ = ["EPS", "FixedBatchNorm", "convert_fixed"]

EPS = "_fixed_eps"  # an attribute of layers that were converted


class FixedBatchNorm(TakesDrawnIn):
    """Stands before a class whose forward is a formula of fixed statistics (formula.py), and computes it in one pass.

    A call in which the formula would broadcast, promote or keep another order in memory goes to that forward.
    """

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, drawn_in: DrawnIn | None = None
    ) -> Tensor:
        """Of (N, C, H, W), with a residual of its size and an activation as :meth:`bnext.BatchNorm2d.forward`."""
        residual, name, parameter = what_follows(residual, drawn_in, None, None)
        running_mean, running_var, weight, bias = state = [getattr(self, tensor) for tensor in STATE]
        if not _is_plain_call(input, state):
            if isinstance(residual, fx.Proxy) and residual.node.args == (None,):  # an argument left out
                residual = None
            return followed(super().forward(input), residual, name, parameter)
        return batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            eps=vars(self)[EPS],
            activation=name,
            activation_param=parameter,
            residual=residual,
            _ndims=(4,),
        )


def _is_plain_call(input: Tensor, state: list[Tensor]) -> bool:
    """Whether our function gives what the formula would, in dtype, size and order, and all its derivatives."""
    return (
        isinstance(input, Tensor)
        and input.dim() == 4
        and input.is_floating_point()
        and input.shape[1] == state[0].numel() > 0
        and all(tensor.dtype == input.dtype and tensor.device == input.device for tensor in state)
        and all(tensor.dim() == 1 and tensor.numel() == state[0].numel() for tensor in state)
        and (input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last))
        and not any(tensor.requires_grad or _has_tangent(tensor) for tensor in state[:2])
    )


def _has_tangent(tensor: Tensor) -> bool:
    return fwAD._current_level >= 0 and fwAD.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def convert_fixed(layer: nn.Module) -> bool:
    """In place: a layer whose forward is that of fixed statistics gets the one above. Whether it is one."""
    eps = eps_of(layer) if _is_plain(layer) else None
    if eps is None:
        return False
    set_class(layer, FixedBatchNorm)
    vars(layer)[EPS] = eps
    return True


def _is_plain(layer: nn.Module) -> bool:
    """Whether it has those four vectors and no other tensor, and our forward may take the place of its own."""
    return (
        {name for name, t in (layer._parameters | layer._buffers).items() if t is not None} == {*STATE}
        and not layer._modules
        and all(isinstance(getattr(layer, name), Tensor) for name in STATE)
        and can_stand_before((FixedBatchNorm, TakesDrawnIn), layer, nn.Module, (EPS,))
    )
