"""Layers whose statistics stay what they are, for fine-tuning."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .arguments import require
from .modules import FusedBatchNorm, require_module

__all__ = ["freeze", "unfreeze"]

Network = TypeVar("Network", bound=nn.Module)


def freeze(module: Network, affine: bool = True) -> Network:
    """Keeps every batch norm in a module, or the module itself, in eval, whatever ``train()`` says later.

    In place. What torchvision's FrozenBatchNorm2d is for, with the layer's own class, parameters and state dict: the
    running statistics normalise and stay, in training and when somebody calls ``reset_running_stats``;
    ``reset_parameters`` does reset them. With ``affine`` weight and bias do not require grad either; then backward
    keeps no input, unless an activation needs it: any but those of which a bit is kept (relu, leaky_relu, relu6).

    Args:
        module: any module with layers of ours; :func:`bnext.convert` makes them.
        affine: whether weight and bias stay as well.

    Returns:
        The same module.

    Raises:
        TypeError: it is no module, or affine no bool.
        ValueError: there is a batch norm of another class, a layer without running statistics, or no layer at all;
            nothing has changed then.
    """
    require("affine", affine, "bool")
    layers = _layers(module)
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(f"expected layers with running statistics, but '{name}' has none")
    return _set(module, layers, True, affine)


def unfreeze(module: Network, affine: bool = True) -> Network:
    """Undoes :func:`freeze`: layers follow the next ``train()``, and with ``affine`` weight and bias require grad.

    Raises:
        TypeError, ValueError: as :func:`freeze`, but for the statistics.
    """
    require("affine", affine, "bool")
    return _set(module, _layers(module), False, affine)


def _layers(module: nn.Module) -> dict[str, FusedBatchNorm]:
    require_module(module)
    layers = {}
    for name, layer in module.named_modules():
        if isinstance(layer, FusedBatchNorm):
            layers[name] = layer
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            way = "makes them of it" if kind.startswith("torch.nn.") else "looks at it with subclasses=True"
            raise ValueError(
                f"expected layers of bnext's classes, but '{name}' is a {kind} (bnext.convert {way})"
            )
    if not layers:
        raise ValueError(f"expected a module with layers of bnext's, but {type(module).__name__} has none")
    return layers


def _set(module: Network, layers: dict[str, FusedBatchNorm], frozen: bool, affine: bool) -> Network:
    for layer in layers.values():
        layer.frozen = frozen
        layer.train(layer.training)
        for parameter in layer.parameters() if affine else ():
            parameter.requires_grad_(not frozen)
    return module
