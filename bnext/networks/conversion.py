"""From torch's layers to ours and back, in a network that exists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch import distributed as dist

from ..arguments import require
from ..attributes import has_hooks, is_held_otherwise
from ..drawn_in import TakesDrawnIn
from ..modules import OUR_ATTRIBUTES, OURS, FusedBatchNorm, SyncBatchNorm, require_module
from ..torch_activations import to_module
from .fixed import EPS
from .fused_forward import FusedForward, is_made, own_class, set_class
from .subclasses import convert_subclasses

__all__ = ["NormActivation", "convert", "is_ours", "restore", "synchronize"]

_SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {nn.SyncBatchNorm: SyncBatchNorm}
_TORCHS = {ours: theirs for theirs, ours in (*OURS.items(), *_SYNCHRONIZED.items())}
Network = TypeVar("Network", bound=nn.Module)


def is_ours(layer: nn.Module) -> bool:
    """Whether a layer does what ours do, but for synchronized ones: of these very classes, or made to."""
    return type(layer) in OURS.values() or (_has_our_forward(layer) and not isinstance(layer, SyncBatchNorm))


def _has_our_forward(layer: nn.Module) -> bool:
    """Whether it is of a class that has it before that of its own, as :func:`convert_subclasses` makes them."""
    return isinstance(layer, TakesDrawnIn) and is_made(layer)


def convert(module: Network, *, subclasses: bool = False) -> Network:
    """Makes every torch batch norm in a module, or the module itself, one of ours.

    In place: a layer stays the same object, with its parameters, buffers, hooks and mode, so that optimizers and other
    references to it hold. Layers of exactly ``nn.BatchNorm1d``, ``2d``, ``3d`` and ``nn.SyncBatchNorm`` are converted;
    subclasses, which may compute something else, stay what they are unless they are asked for. Activations stay where
    they are as well: :func:`bnext.fuse` draws them in.

    Args:
        module: any module.
        subclasses: whether to look at layers of subclasses of ``nn.BatchNorm1d``, ``2d`` and ``3d`` too, such as timm's
            BatchNormAct2d. One whose forward is torch's function of its own state, and then one of our activations or
            nothing, gets that of ours; torch.fx tells. It is still of its own class, but its children are called no
            more, and what Python decides in its own forward is decided for good: attributes that it asks for, whether
            there are other processes, and the number of dimensions. The same goes for layers of no class of torch's
            that normalize by four vectors alone, as the FrozenBatchNorm2d of torchvision, DETR and detectron2 do.
            All of these take their input by position, and torch.jit.script takes none of them.

    Returns:
        The same module.

    Raises:
        TypeError: it is no module, or subclasses no bool.
        ValueError: one of torch's layers has an attribute or a child that somebody gave it and that would mean
            something to ours; nothing has changed then.
    """
    require("subclasses", subclasses, "bool")
    convert_classes(module, {**OURS, **_SYNCHRONIZED})
    if subclasses:
        convert_subclasses(module)
    return module


def convert_classes(module: Network, classes: Mapping[type[nn.Module], type[nn.Module]]) -> Network:
    """:func:`convert`, of these of torch's classes."""
    require_module(module)
    layers = {name: layer for name, layer in module.named_modules() if type(layer) in classes}
    for name, layer in layers.items():
        for attribute in OUR_ATTRIBUTES:
            if hasattr(layer, attribute):
                raise ValueError(
                    f"expected no attribute {attribute} of torch's layer '{name}', but it has one"
                )
    for layer in layers.values():
        layer.__class__ = classes[type(layer)]
        vars(layer).update(OUR_ATTRIBUTES)
    return module


def synchronize(module: Network, process_group: dist.ProcessGroup | None = None) -> Network:
    """Makes every batch norm in a module, torch's or ours, or the module itself, a :class:`bnext.SyncBatchNorm`.

    What :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` does, but in place, as :func:`convert` does it, and on
    the CPU too; activations of our layers stay. To be called before DistributedDataParallel wraps the module.

    Args:
        module: any module.
        process_group: whose statistics to share; None for all processes.

    Returns:
        The same module.

    Raises:
        TypeError: it is no module.
        ValueError: a layer with ``inplace=True``, or one of a subclass of torch's or of ours, which may do anything
            and would keep statistics of its own (:func:`convert` looks at them with ``subclasses=True``); one that
            :func:`convert` refuses. Nothing has changed then.
    """
    require_module(module)
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    }
    for name, layer in layers.items():
        if type(layer) not in (*_TORCHS, *_TORCHS.values()) and not _has_our_forward(layer):
            raise ValueError(
                f"expected torch's or bnext's layers, but '{name}' is a {type(layer).__name__} "
                "(bnext.convert looks at it with subclasses=True)"
            )
        if isinstance(layer, FusedBatchNorm) and layer.inplace:
            raise ValueError(f"expected inplace=False, but got True in '{name}'")
    convert(module)
    for layer in layers.values():
        if _has_our_forward(layer):
            set_class(layer, SyncBatchNorm)
        else:
            layer.__class__ = SyncBatchNorm
        vars(layer)["process_group"] = process_group
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

    ``nn.utils.fuse_conv_bn_eval``, quantization and ``nn.SyncBatchNorm.convert_sync_batchnorm`` go by the
    class and would drop an activation in silence. A layer without activation stays the same object; if it is called
    with a residual it then raises TypeError, as torch's do. One of a subclass that :func:`convert` was asked for has
    its own forward again. Another with an activation becomes ``norm`` in a :class:`NormActivation`, which takes a
    residual too, so that keys of its state dict gain ``.norm``. What had ``inplace=True`` no longer writes to its
    input, what was frozen is in eval until ``train()`` is called, and batches that are not finite are no longer
    skipped.

    Args:
        module: any module, not one that :func:`bnext.fuse` gave: the one that was fused is still there, and shares its
            parameters and buffers.

    Returns:
        The same module, or what stands for it where it is itself a layer with an activation.

    Raises:
        TypeError: it is no module.
        ValueError: a layer with ``unbiased_running_var=False``, which torch cannot do; one of a subclass of ours, or
            parametrized; one of a subclass of torch's that was synchronized; one with an activation and hooks, for
            there is no call left that both belong to, or to which an attribute leads that is no child, as a list or a
            function may, where nobody could put what stands for it; a module that came from :func:`bnext.fuse`.
            Nothing has changed then.
    """
    require_module(module)
    if any(
        isinstance(part, FusedForward) and not isinstance(part, TakesDrawnIn) for part in module.modules()
    ):
        raise ValueError(
            "expected a module that bnext.fuse has not made, but got one that it has: the module that was fused "
            "is still as it was and shares parameters and buffers with it; restore that"
        )
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, TakesDrawnIn)}
    for name, layer in layers.items():
        if type(layer) not in _TORCHS and not _has_our_forward(layer):
            raise ValueError(f"expected layers of bnext's classes, but '{name}' is a {type(layer).__name__}")
        if _has_our_forward(layer) and isinstance(layer, SyncBatchNorm):
            raise ValueError(
                f"expected a class to go back to, but '{name}' never was a synchronized layer of it"
            )
        if isinstance(layer, FusedBatchNorm) and not layer.unbiased_running_var:
            raise ValueError(
                f"expected unbiased_running_var=True, as torch's layers have it, but got False in '{name}'"
            )
        if _has_our_forward(layer) or layer.activation is None:
            continue
        if has_hooks(layer):
            raise ValueError(f"expected no hooks on a layer with an activation, but '{name}' has some")
        if is_held_otherwise(layer, module):
            raise ValueError(
                "expected a layer with an activation to be called by the name that it is registered with, but "
                f"'{name}' is held in another way too"
            )
    stand_ins: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        before = own_class(layer)
        added: Iterable[str] = (EPS,)
        activation = parameter = None
        if isinstance(layer, FusedBatchNorm):
            added = OUR_ATTRIBUTES
            activation, parameter = layer.activation, layer.activation_param
        as_torch_has_it: nn.Module = layer
        as_torch_has_it.__class__ = _TORCHS.get(before, before)
        for attribute in added:
            delattr(layer, attribute)
        if activation is not None and before in _TORCHS:
            stand_ins[layer] = NormActivation(layer, to_module(activation, parameter))
    for parent in [*module.modules()]:
        for name, child in [*parent._modules.items()]:
            if child in stand_ins:
                setattr(parent, name, stand_ins[child])
    return stand_ins.get(module, module)
