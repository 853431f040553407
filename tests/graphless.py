"""Networks that do what a graph of their forward does not keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from networks import Net


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(3)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 1)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Frozen(nn.Sequential):
    """Its batch norm stays in eval, as detection has it."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[1].eval()
        return self


class Merges(nn.Module):
    """Adds one weight to the other in eval, as low-rank adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.d = nn.Parameter(torch.ones(3, 3, 1, 1)), nn.Parameter(torch.ones(3, 3, 1, 1))
        self.merged, self.norm = False, norm()

    def train(self, mode: bool = True) -> Merges:
        super().train(mode)
        if mode == self.merged:
            self.w.data += -self.d.data if mode else self.d.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(F.conv2d(x, self.w if self.merged else self.w + self.d)))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = norm(), conv()

    def forward(self, x: Tensor, flag: Tensor | None = None) -> Tensor:
        return F.relu(self.norm(self.up(x) if flag is not None else x))


class Counts(nn.Module):
    def __init__(self, function: Callable[[Counts], None]) -> None:
        super().__init__()
        self.function, self.norm = function, norm()
        self.register_buffer("n", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.function(self)
        return F.relu(self.norm(x)) * self.n


class Twice(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class Held(nn.Module):
    """Calls its layer by another way than its name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = norm()
        self.layers = [self.norm]
        self.way = self.along

    def along(self, x: Tensor) -> Tensor:
        return F.relu(self.layers[0](x))

    def forward(self, x: Tensor) -> Tensor:
        y = self.way(x)
        return y if y.sum() > -1e9 else x


def without_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = net.conv(x)
    return F.relu(net.norm(h)) + x


def average(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.norm(x))
    with torch.no_grad():
        net.other.running_mean.lerp_(y.mean((0, 2, 3)), 0.1)
    return y


def counts_in_training(net: Counts) -> None:
    if net.training:
        net.n += 1


def hooked(module: nn.Module, kind: str = "forward") -> nn.Module:
    {
        "forward": lambda: module.register_forward_hook(lambda module, args, y: y * 2),
        "before": lambda: module.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        "backward": lambda: module.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2,)),
    }[kind]()
    return module


def with_forward(module: nn.Module, factor: float) -> nn.Module:
    module.forward = lambda x: factor * type(module).forward(module, x)
    return module


def block() -> nn.Sequential:
    return nn.Sequential(conv(), norm(), nn.Sigmoid())


def again_in_training(net: Net, x: Tensor) -> Tensor:
    y = net.block(x)
    return y + net.block[1](x) if net.training else y


def again_after_a_question(net: Net, x: Tensor) -> Tensor:
    y = net.block(x)
    return net.block[1](y) if y.sum() > -1e9 else y


def again_unseen(net: Net, x: Tensor) -> Tensor:
    y = net.block(x)
    return y + net.block[1].forward(x) if type(x) is not fx.Proxy else y


def by_data(h: Tensor) -> None:
    h.data = h.data * 2


def writes(write: Callable[[Tensor], object]) -> Callable[[Net, Tensor], Tensor]:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = x * 1
        z = net.norm(x)
        write(h)
        return z + h

    return forward


def written_afterwards(net: Net, x: Tensor) -> Tensor:
    h = x * 1
    y = F.silu(net.norm(x) + h)
    h.mul_(2)
    return y


NETS: dict[str, Callable[[], nn.Module]] = {
    "no grad": lambda: Net(without_grad, norm=norm(), conv=conv()),
    "an average without grad": lambda: Net(average, norm=norm(), other=norm()),
    "an autograd function": lambda: Net(lambda net, x: Reversal.apply(F.relu(net.norm(x))), norm=norm()),
    "a frozen batch norm": lambda: nn.Sequential(Frozen(conv(), norm(), nn.ReLU()), conv()),
    "merged in eval": Merges,
    "an optional argument": Optional,
    "an optional argument of a part": lambda: nn.Sequential(Optional(), conv()),
    "counts calls": lambda: Counts(lambda net: net.n.add_(1)),
    "counts calls in training": lambda: Counts(counts_in_training),
    "a constant that differs": lambda: Net(
        lambda net, x: F.relu(net.norm(x)) * torch.tensor(2.0 if net.training else 3.0), norm=norm()
    ),
    "statistics in the forward": lambda: Net(
        lambda net, x: F.relu(net.norm(x)) + net.norm.running_mean.sum(), norm=norm()
    ),
    "hooked": lambda: hooked(nn.Sequential(conv(), norm(), nn.ReLU())),
    "hooked before": lambda: hooked(nn.Sequential(conv(), norm(), nn.ReLU()), "before"),
    "hooked backward": lambda: hooked(nn.Sequential(conv(), norm(), nn.ReLU()), "backward"),
    "a hooked part": lambda: nn.Sequential(hooked(nn.Sequential(conv(), norm(), nn.ReLU())), conv()),
    "a part hooked backward": lambda: nn.Sequential(
        hooked(nn.Sequential(conv(), norm(), nn.ReLU()), "backward"), conv()
    ),
    "a hooked convolution": lambda: nn.Sequential(hooked(conv()), norm(), nn.ReLU()),
    "another call": lambda: Twice(conv(), norm(), nn.ReLU()),
    "another call of a part": lambda: nn.Sequential(Twice(conv(), norm(), nn.ReLU()), conv()),
    "called again in training": lambda: Net(again_in_training, block=block()),
    "called again after a question": lambda: Net(again_after_a_question, block=block()),
    "called again unseen": lambda: Net(again_unseen, block=block()),
    "a residual written afterwards": lambda: Net(written_afterwards, norm=norm()),
    "an operator that writes": lambda: Net(writes(lambda h: torch.ops.aten.mul_.Tensor(h, 2)), norm=norm()),
    "data that is replaced": lambda: Net(writes(by_data), norm=norm()),
    "data that is written": lambda: Net(writes(lambda h: h.data.mul_(2)), norm=norm()),
}
