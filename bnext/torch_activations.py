"""Which of torch's modules, functions and methods is which activation of ours: one table, read both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Activation", "apply", "followed", "of_call", "of_module", "to_module"]


class Activation(NamedTuple):
    """The two keywords of a layer."""

    activation: str
    activation_param: float | None


@dataclass(frozen=True)
class _Entry:
    module: type[nn.Module]
    functions: tuple[Callable[..., Any], ...]
    methods: tuple[str, ...] = ()
    parameter: str | None = None  # keyword of the module and second argument of the functions


_TABLE = {
    "relu": _Entry(nn.ReLU, (F.relu, F.relu_, torch.relu, torch.relu_), ("relu", "relu_")),
    "leaky_relu": _Entry(nn.LeakyReLU, (F.leaky_relu, F.leaky_relu_), (), "negative_slope"),
    "relu6": _Entry(nn.ReLU6, (F.relu6,)),
    "silu": _Entry(nn.SiLU, (F.silu,)),
    "gelu": _Entry(nn.GELU, (F.gelu,)),
    "elu": _Entry(nn.ELU, (F.elu, F.elu_), (), "alpha"),
    "hardswish": _Entry(nn.Hardswish, (F.hardswish,)),
    "sigmoid": _Entry(nn.Sigmoid, (F.sigmoid, torch.sigmoid, torch.sigmoid_), ("sigmoid", "sigmoid_")),
    "tanh": _Entry(nn.Tanh, (F.tanh, torch.tanh, torch.tanh_), ("tanh", "tanh_")),
}
_BY_MODULE = {entry.module: name for name, entry in _TABLE.items()}
_BY_FUNCTION = {function: name for name, entry in _TABLE.items() for function in entry.functions}
_BY_METHOD = {method: name for name, entry in _TABLE.items() for method in entry.methods}
# What else a call may say without being another activation.
_HARMLESS = {"input", "inplace"}


def of_module(module: nn.Module) -> Activation | None:
    """The activation that this very class computes, None if it is none of ours."""
    if type(module) in (nn.ReLU6, nn.Hardtanh):
        return _of_hardtanh(module.min_val, module.max_val)
    name = _BY_MODULE.get(type(module))
    if name is None or getattr(module, "approximate", "none") != "none":
        return None
    parameter = _TABLE[name].parameter
    return Activation(name, None if parameter is None else float(getattr(module, parameter)))


def of_call(
    target: Callable[..., Any] | str, arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> Activation | None:
    """The activation that a function, or a method if it is named, computes of its first argument."""
    if target in (F.hardtanh, F.hardtanh_):
        bounds = dict(zip(("min_val", "max_val"), arguments[1:], strict=False)) | dict(keywords)
        return _of_hardtanh(bounds.get("min_val", -1), bounds.get("max_val", 1))
    name = _BY_METHOD.get(target) if isinstance(target, str) else _BY_FUNCTION.get(target)
    if name is None:
        return None
    entry = _TABLE[name]
    rest = {key: value for key, value in keywords.items() if key not in _HARMLESS}
    if rest.pop("approximate", "none") != "none":
        return None
    if entry.parameter is None:
        return None if rest else Activation(name, None)
    value = rest.pop(entry.parameter, arguments[1] if len(arguments) > 1 else None)
    if rest or not isinstance(value, int | float | None):
        return None
    return Activation(name, None if value is None else float(value))


def _of_hardtanh(low: Any, high: Any) -> Activation | None:
    return Activation("relu6", None) if (low, high) == (0, 6) else None


def apply(activation: str, activation_param: float | None, y: Tensor) -> Tensor:
    """Torch's function for one of ours."""
    given = () if activation_param is None else (activation_param,)
    activated: Tensor = _TABLE[activation].functions[0](y, *given)
    return activated


def followed(y: Tensor, residual: Tensor | None, activation: str | None, parameter: float | None) -> Tensor:
    """activation(y + residual), by torch's own functions."""
    if residual is not None:
        y = y + residual
    return y if activation is None else apply(activation, parameter, y)


def to_module(activation: str, activation_param: float | None) -> nn.Module:
    """Torch's module for one of ours."""
    entry = _TABLE[activation]
    given = {} if activation_param is None else {str(entry.parameter): activation_param}
    return entry.module(**given)
