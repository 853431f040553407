"""Drop-in replacements of torch.nn.BatchNorm1d, 2d and 3d, and of SyncBatchNorm: state, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .arguments import require
from .drawn_in import DrawnIn, TakesDrawnIn, what_follows
from .functional import batch_norm, check_activation
from .holding import are_held
from .sync import Running
from .sync import batch_norm as sync_batch_norm

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's from Python 3.11 on

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"]


def require_module(module: object) -> None:
    """Of what takes a network.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(module).__name__}")


# weight, bias, running_mean, running_var, num_batches_tracked
_State = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


OUR_ATTRIBUTES: dict[str, Any] = {  # that torch's layers lack, as they are unless somebody says otherwise
    "unbiased_running_var": True,
    "activation": None,
    "activation_param": None,
    "inplace": False,
    "skip_nonfinite": False,
    "frozen": False,
}


class FusedBatchNorm(TakesDrawnIn, nn.modules.batchnorm._BatchNorm):
    """What the classes share.

    Every check on the input stands in the operator, before anything is touched, and forward does not look at the
    input: a symbolic trace of a layer alone records one call.
    """

    _ndims: ClassVar[tuple[int, ...]]
    frozen = False  # asked before __init__ sets it: torch's resets the parameters

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        unbiased_running_var: bool = True,
        activation: str | None = None,
        activation_param: float | None = None,
        inplace: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        check_activation(activation, activation_param, inplace)
        require("unbiased_running_var", unbiased_running_var, "bool")
        require("skip_nonfinite", skip_nonfinite, "bool")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.unbiased_running_var = unbiased_running_var
        self.activation = activation
        self.activation_param = None if activation_param is None else float(activation_param)
        self.inplace = inplace
        self.skip_nonfinite = skip_nonfinite
        self.frozen = False

    def reset_running_stats(self) -> None:
        """As torch's, but a layer that :func:`bnext.freeze` has frozen keeps them: who resets statistics to have the
        next batches fill them again, as torch.optim.swa_utils.update_bn does, would never get them back."""
        if not self.frozen:
            super().reset_running_stats()

    def reset_parameters(self) -> None:
        """As torch's, running statistics included, those of a frozen layer too."""
        frozen, self.frozen = self.frozen, False
        try:
            super().reset_parameters()
        finally:
            self.frozen = frozen

    @property
    def _is_impure(self) -> bool:
        """For torch.fx, which removes a call whose result nobody uses unless it is."""
        return self.inplace

    def train(self, mode: bool = True) -> Self:
        """As every module's, but a layer that :func:`bnext.freeze` has frozen stays in eval."""
        super().train(mode)
        return super().train(False) if self.frozen else self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle of torch's class, or of ours from before there was one of these.
        super().__setstate__(OUR_ATTRIBUTES | state)

    def extra_repr(self) -> str:
        """Torch's line, and what is ours where it is set."""
        line = str(super().extra_repr())
        for name, default in OUR_ATTRIBUTES.items():
            value = getattr(self, name)
            if value != default:
                line += f", {name}={value}"
        return line

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, drawn_in: DrawnIn | None = None
    ) -> Tensor:
        """Normalises input (N, C, ...), and adds residual of the same size, dtype and device before the activation.

        Returns (N, C, ...) of the input's dtype, with ``inplace`` the input itself. See
        :func:`bnext.functional.batch_norm`, also for the errors. drawn_in is what :func:`bnext.fuse` gives: residual,
        activation and activation_param of this call, in the place of residual and of the layer's own.
        """
        residual, name, parameter = what_follows(residual, drawn_in, self.activation, self.activation_param)
        training = self.training
        tracking = training and self.track_running_stats
        weight, bias, running_mean, running_var, counter = self._tensors()
        return batch_norm(
            input,
            running_mean if tracking or not training else None,
            running_var if tracking or not training else None,
            weight,
            bias,
            training or (running_mean is None and running_var is None),
            self.momentum,
            self.eps,
            unbiased_running_var=self.unbiased_running_var,
            num_batches_tracked=counter if tracking else None,
            activation=name,
            activation_param=parameter,
            residual=residual,
            inplace=self.inplace,
            skip_nonfinite=self.skip_nonfinite,
            _ndims=self._ndims,
        )

    def _is_bare(self) -> bool:
        return self.activation is None and not self.inplace

    def _tensors(self) -> _State:
        """Parameters and buffers. Five walks to nn.Module.__getattr__ take longer than to normalise a small batch."""
        try:
            parameters, buffers = self._parameters, self._buffers
            return (
                parameters["weight"],
                parameters["bias"],
                buffers["running_mean"],
                buffers["running_var"],
                buffers["num_batches_tracked"],
            )
        except KeyError:  # parametrized, pruned, replicated: attributes of another kind
            counter = self.num_batches_tracked if self.training else None
            return self.weight, self.bias, self.running_mean, self.running_var, counter


class BatchNorm1d(FusedBatchNorm, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L) input.

    :class:`torch.nn.BatchNorm1d` with the same arguments, state and errors, and the keywords ``unbiased_running_var``
    (False: the running variance takes the biased batch variance, as Flax and Keras do), ``activation`` and
    ``activation_param`` (the layer gives ``activation(batch_norm(x))``), ``inplace`` (True: over x, which backward
    recovers from the output), and ``skip_nonfinite`` (True: a channel whose batch is not finite leaves its running
    statistics alone). Called as ``layer(x, residual)`` it gives ``activation(batch_norm(x) + residual)``. See
    :func:`bnext.functional.batch_norm`. The constructor raises ValueError for an activation that is not known, and with
    ``inplace`` for one that has no inverse; so does a call with ``inplace`` and a residual.
    """

    _ndims = (2, 3)


class BatchNorm2d(FusedBatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W) input, contiguous or channels_last; see :class:`BatchNorm1d`."""

    _ndims = (4,)


class BatchNorm3d(FusedBatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W) input, contiguous or channels_last_3d; see :class:`BatchNorm1d`."""

    _ndims = (5,)


class SyncBatchNorm(FusedBatchNorm):
    """Batch normalization of (N, C, ...) input over the batches of all processes of a group.

    :class:`torch.nn.SyncBatchNorm` with the same arguments and state, and the keywords ``unbiased_running_var``,
    ``activation``, ``activation_param`` and ``skip_nonfinite`` of :class:`bnext.BatchNorm1d`; called as
    ``layer(x, residual)`` it gives ``activation(batch_norm(x) + residual)``. It takes CPU tensors as well as CUDA ones,
    processes may have no sample, and gradients can be differentiated. Statistics are those of one process in eval,
    without a process group, and in a group of one.

    It is no subclass of torch's class, which DistributedDataParallel refuses on the CPU. torch.compile takes it in one
    graph, where it asks other processes too.

    :func:`bnext.synchronize` makes it of other layers, :func:`bnext.convert` of torch's synchronized ones.

    Args:
        process_group: None for all processes; see :func:`torch.distributed.new_group`.
    """

    process_group: dist.ProcessGroup | None

    _ndims = ()  # any from 2

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **keywords: Any,
    ) -> None:
        if keywords.pop("inplace", False):
            raise ValueError("expected inplace=False: a synchronized layer keeps its input for backward")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **keywords)
        self.process_group = process_group

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, drawn_in: DrawnIn | None = None
    ) -> Tensor:
        """As :meth:`bnext.BatchNorm1d.forward`, with statistics of all processes; see
        :func:`bnext.sync.batch_norm`, also for the errors."""
        group = self._group()
        if group is None:
            return super().forward(input, residual, drawn_in=drawn_in)
        residual, name, parameter = what_follows(residual, drawn_in, self.activation, self.activation_param)
        weight, bias, running_mean, running_var, counter = self._tensors()
        tracking = self.track_running_stats and not are_held()
        tracked = (running_mean, running_var, counter) if tracking else (None, None, None)
        return sync_batch_norm(
            input,
            Running(*tracked, self.momentum, self.unbiased_running_var, self.skip_nonfinite),
            weight,
            bias,
            self.eps,
            group,
            activation=name,
            activation_param=parameter,
            residual=residual,
        )

    def _group(self) -> dist.ProcessGroup | None:
        """Of processes to ask, None if there is nobody."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


OURS: dict[type[nn.Module], type[FusedBatchNorm]] = {  # by torch's
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
