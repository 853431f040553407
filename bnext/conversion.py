"""From torch's layers to ours and back, in a network that exists."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, fx, nn

from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .torch_activations import to_module

__all__ = ["OURS", "NormActivation", "convert", "restore"]

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_TORCHS = {ours: theirs for theirs, ours in OURS.items()}
FUSED = "made by bnext.fuse"  # key in the meta of a GraphModule
_NEW = ("unbiased_running_var", "activation", "activation_param", "inplace")  # attributes that torch's lack

Network = TypeVar("Network", bound=nn.Module)


def convert(module: Network) -> Network:
    """Makes every torch batch norm in a module, or the module itself, one of ours.

    In place: a layer stays the same object, with its parameters, buffers, hooks and mode, so that optimizers and other
    references to it hold. Layers of exactly ``nn.BatchNorm1d``, ``2d`` and ``3d`` are converted; subclasses, which may
    compute something else, and ``nn.SyncBatchNorm`` stay what they are. Activations stay where they are as well:
    :func:`bnext.fuse` draws them in.

    Args:
        module: any module.

    Returns:
        The same module.
    """
    for layer in module.modules():
        ours = OURS.get(type(layer))
        if ours is not None:
            layer.__class__ = ours
            layer.__setstate__(layer.__dict__)  # sets what torch's has not
    return module


class NormActivation(nn.Module):
    """activation(norm(x)), or activation(norm(x) + residual): what :func:`restore` makes of a layer with both.

    ``norm`` is one of torch's layers, ``activation`` torch's module.
    """

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation
        self.training = norm.training

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of (N, C, ...) and a residual of the same size."""
        z: Tensor = self.norm(input)
        if residual is not None:
            z = z + residual
        y: Tensor = self.activation(z)
        return y


def restore(module: nn.Module) -> nn.Module:
    """Makes every one of our layers in a module torch's again, for what knows torch's alone.

    Exporters, ``nn.utils.fuse_conv_bn_eval``, quantization and ``nn.SyncBatchNorm.convert_sync_batchnorm`` go by the
    class and would drop an activation in silence. A layer without activation stays the same object. One with an
    activation becomes ``norm`` in a :class:`NormActivation`, so that keys of its state dict gain ``.norm``.

    Args:
        module: any module, not one that :func:`bnext.fuse` gave: the one that was fused is still there, and shares its
            parameters and buffers.

    Returns:
        The same module, or what stands for it where it is itself a layer with an activation.

    Raises:
        ValueError: a layer with ``unbiased_running_var=False``, which torch cannot do; nothing has changed then. A
            module that came from :func:`bnext.fuse`.
    """
    if any(isinstance(part, fx.GraphModule) and FUSED in part.meta for part in module.modules()):
        raise ValueError(
            "expected a module that bnext.fuse has not made, but got one that it has: the module that was fused "
            "is still as it was and shares parameters and buffers with it; restore that"
        )
    layers = {name: layer for name, layer in module.named_modules() if type(layer) in _TORCHS}
    for name, layer in layers.items():
        if not layer.unbiased_running_var:
            raise ValueError(
                f"expected unbiased_running_var=True, as torch's layers have it, but got False in '{name}'"
            )
    stand_ins = {}
    for layer in layers.values():
        activation, parameter = layer.activation, layer.activation_param
        layer.__class__ = _TORCHS[type(layer)]
        for attribute in _NEW:
            delattr(layer, attribute)
        if activation is not None:
            stand_ins[layer] = NormActivation(layer, to_module(activation, parameter))
    for parent in [*module.modules()]:
        for name, child in [*parent._modules.items()]:
            if child in stand_ins:
                setattr(parent, name, stand_ins[child])
    return stand_ins.get(module, module)
