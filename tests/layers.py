"""The layers of every class: ours and torch's with their options, inputs, a step of training one, ways to copy one."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnext
from bits import assert_same_bits

# Ours, torch's, and an input for both.
PAIRS = {
    "1d-nc": (bnext.BatchNorm1d, nn.BatchNorm1d, (16, 5)),
    "1d-ncl": (bnext.BatchNorm1d, nn.BatchNorm1d, (4, 5, 9)),
    "2d": (bnext.BatchNorm2d, nn.BatchNorm2d, (4, 5, 6, 7)),
    "3d": (bnext.BatchNorm3d, nn.BatchNorm3d, (2, 5, 3, 4, 5)),
}
Pair = tuple[type[nn.Module], type[nn.Module], tuple[int, ...]]
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
# One for each class.
CLASSES = {"1d": PAIRS["1d-nc"], "2d": PAIRS["2d"], "3d": PAIRS["3d"]}
every_class = pytest.mark.parametrize("pair", CLASSES.values(), ids=CLASSES.keys())

# Every way to make the layer that changes what it holds or does.
TORCH_TAKES_BIAS = "bias" in inspect.signature(nn.BatchNorm2d).parameters  # not in 2.11
OPTIONS: list[dict[str, Any]] = [
    {},
    {"affine": False},
    *([{"bias": False}] if TORCH_TAKES_BIAS else []),
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-2},
]
every_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default"
)

# Two float64 computations of one formula, a few dozen roundings of values below 10.
CLOSE_OF_A_LAYER = {"rtol": 1e-12, "atol": 1e-13}
# float32 in torch's operators, whose formula has other roundings: a dozen of values below 30, and of sums of a channel.
AS_TORCH_INFERS = {"rtol": 1e-5, "atol": 2e-5}


def inputs(
    pair: Pair, device: str = "cpu", dtype: torch.dtype = torch.float64, count: int = 3
) -> list[Tensor]:
    torch.manual_seed(12)
    return [(torch.randn(pair[2], dtype=torch.float64) * 2 + 1).to(device, dtype) for _ in range(count)]


def input_of(pair: Pair, dtype: torch.dtype = torch.float32) -> Tensor:
    (x,) = inputs(pair, dtype=dtype, count=1)
    return x


def layer_step(
    layer: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor | None]:
    """y and all gradients of one step, the loss being a weighted sum. `call`: the layer if it is called otherwise."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = (layer if call is None else call)(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def step_and_buffers(
    layer: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """The same, and the buffers after it: copies, which later steps leave alone."""
    return [tensor.detach().clone() for tensor in (*layer_step(layer, x, call), *layer.buffers())]


def assert_as_eager(found: list[Tensor], expected: list[Tensor], training: bool) -> None:
    """In training the same bits, for it is the same operator; inference is compiled of torch's."""
    if training:
        assert_same_bits(found, expected)
    else:
        torch.testing.assert_close(found, expected, **AS_TORCH_INFERS)


def through_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def through_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_copy = pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_save])
