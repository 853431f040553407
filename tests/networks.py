"""Small networks as the field writes them, with torch's layers alone; and a step of training one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """A forward that is given, `forward(net, x)`, and the modules that it calls."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Unlike(nn.BatchNorm2d):
    """A subclass computes what it likes."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class BasicBlock(nn.Module):
    """As torchvision has it: one ReLU module, called twice, and `out += identity`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class FunctionalBlock(nn.Module):
    """The same with functions, and a shortcut that may be an empty Sequential."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)


class PreActivation(nn.Module):
    """Batch norm first; what is added comes from a convolution, so that nothing of the sum can be drawn in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(torch.relu(self.bn1(x)))
        out = self.conv2(self.bn2(out).relu())
        return out + x


class Inverted(nn.Module):
    """MobileNetV3's block with squeeze and excitation: a product behind the batch norm, a sum without activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU(True)
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide, 1), nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(self.expand(x))
        return self.project(out * self.gate(out)) + x


def stack(*blocks: nn.Module, width: int = 4) -> nn.Sequential:
    """A stem, blocks from `width` channels on, a classifier of whatever they give."""
    stem = (nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: stack(BasicBlock(4, 4), BasicBlock(4, 6, 2)),
    "functional": lambda: stack(FunctionalBlock(4, 4), FunctionalBlock(4, 6, 2)),
    "pre-activation": lambda: stack(PreActivation(4)),
    "inverted": lambda: stack(Inverted(4)),
}
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())

# Two float64 computations of a network of a few layers with weights around 1: some hundred roundings, enlarged by
# the division by a standard deviation in each layer.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def images(**options: Any) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(4, 3, 8, 10, dtype=torch.float64, **options)


def make(network: Callable[[], nn.Module]) -> nn.Module:
    """In float64, with every parameter and buffer set to something of its own."""
    torch.manual_seed(4)
    made = network().double()
    with torch.no_grad():
        made(images())
        for parameter in made.parameters():
            parameter.uniform_(0.5, 1.5).mul_(torch.randn_like(parameter).sign_())
    return made


def step(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a step gives by name: outputs, gradients of the input and of every parameter that has one."""
    x = x.clone().requires_grad_()
    network.zero_grad()
    outputs = network(x)
    outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs]
    sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {**{f"output {i}": y.detach() for i, y in enumerate(outputs)}, "x": x.grad, **gradients}
