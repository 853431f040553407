"""bnext.fuse and hooks that are put on batch norms after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bnext
from networks import CLOSE, NETWORKS, images, make, step


def halved(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (args[0] / 2 + 1,)


def doubled(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    assert len(args) == 1
    return y * 2 - 1


def negated(module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    assert len(inputs) == len(outputs) == 1
    return (-inputs[0],)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "before": lambda layer: layer.register_forward_pre_hook(halved),
    "after": lambda layer: layer.register_forward_hook(doubled),
    "backward": lambda layer: layer.register_full_backward_hook(negated),
}


# Torch has no full backward hook before a write over the output, as the other networks have it.
OUT_OF_PLACE = ("functional", "pre-activation")
CASES = [
    (network, hook) for network in NETWORKS for hook in HOOKS if hook != "backward" or network in OUT_OF_PLACE
]


@pytest.mark.parametrize(("network", "hook"), CASES)
def test_hooks_on_batch_norms_see_the_layer(network: str, hook: str) -> None:
    """Put there after the fusion; and when they are gone it is as it was."""
    plain = make(NETWORKS[network])
    fused = bnext.fuse(copy.deepcopy(plain), images())
    handles = [
        HOOKS[hook](part)
        for one in (plain, fused)
        for part in one.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
    ]
    assert len(handles) >= 6
    expected = step(plain, images())
    torch.testing.assert_close(step(fused, images()), expected, **CLOSE)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


@pytest.mark.parametrize("hook", ["before", "after"])
def test_hooks_on_all_modules_see_the_layer(hook: str) -> None:
    """Put there after the fusion, while activations are no modules of either network."""
    register = {
        "before": lambda: nn.modules.module.register_module_forward_pre_hook(halve_norms),
        "after": lambda: nn.modules.module.register_module_forward_hook(double_norms),
    }[hook]
    plain = make(NETWORKS["pre-activation"])
    fused = bnext.fuse(copy.deepcopy(plain), images())
    handle = register()
    try:
        torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)
    finally:
        handle.remove()


def halve_norms(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
    return halved(module, args) if isinstance(module, nn.modules.batchnorm._BatchNorm) else None


def double_norms(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
    return doubled(module, args, y) if isinstance(module, nn.modules.batchnorm._BatchNorm) else None


def test_a_hooked_network_is_traced() -> None:
    fused = bnext.fuse(make(NETWORKS["functional"]), images()).eval()
    for part in fused.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.register_forward_hook(doubled)
    torch.testing.assert_close(fx.symbolic_trace(fused)(images()), fused(images()), **CLOSE)
