"""bnext.fuse of networks that do what a graph does not keep: whatever it makes of them, it does the same."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bnext
from networks import Net, images, make, step
from test_fusion import CLOSE


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
    "an operator that writes": lambda: Net(writes(lambda h: torch.ops.aten.mul_.Tensor(h, 2)), norm=norm()),
    "data that is replaced": lambda: Net(writes(by_data), norm=norm()),
    "data that is written": lambda: Net(writes(lambda h: h.data.mul_(2)), norm=norm()),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(4)
    return NETS[name]().double()


@pytest.mark.parametrize("name", NETS)
def test_it_does_the_same(name: str) -> None:
    plain, original = network(name), network(name)
    try:
        fused = bnext.fuse(original, images())
    except ValueError as error:
        assert "computes the same with fused modules" in str(error)
        fused = None
    torch.testing.assert_close(original.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert [type(module) for module in original.modules()] == [type(module) for module in plain.modules()]
    assert [vars(module).keys() for module in original.modules()] == [
        vars(module).keys() for module in plain.modules()
    ]
    assert [module.training for module in original.modules()] == [
        module.training for module in plain.modules()
    ]
    if fused is None:
        return
    fused = copy.deepcopy(fused)
    for training in (True, True, False, True):
        plain.train(training), fused.train(training)
        torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)
        torch.testing.assert_close(dict(fused.state_dict()), dict(plain.state_dict()), **CLOSE)


def test_modes_are_apart() -> None:
    network = nn.Sequential(conv(), norm(), nn.ReLU(), nn.Dropout(0.5))
    fused = bnext.fuse(network, images().float()).eval()
    assert all(module.training for module in network.modules())
    assert not any(module.training for module in fused.modules())


def test_outputs_keep_their_type() -> None:
    plain = Net(lambda net, x: OrderedDict(a=F.relu(net.norm(x))), norm=norm()).double()
    assert type(bnext.fuse(plain, images())(images())) is OrderedDict


def test_names_are_the_same() -> None:
    plain = Net(lambda net, x: F.relu(net.norm(x)), norm=norm(), unused=norm()).double()
    plain.again = plain.norm
    plain.register_buffer("passing", torch.ones(2), persistent=False)
    fused = bnext.fuse(plain, images())
    assert [*fused.state_dict()] == [*plain.state_dict()]
    fused.load_state_dict(plain.state_dict())


def test_under_autocast_it_is_asked_of_what_autocast_gives() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return F.relu(net.norm(net.conv(x)) + x)  # 16 bits and float32

    plain = Net(forward, norm=norm(), conv=conv())
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        fused = bnext.fuse(plain, x)
        torch.testing.assert_close(fused(x), plain(x))


def test_autocast_in_the_forward() -> None:
    """It does nothing in float64, where graphs are tried."""

    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = net.conv(x)
        return F.relu(net.norm(h)) + net.block(x)

    plain = Net(forward, norm=norm(), conv=conv(), block=nn.Sequential(conv(), norm(), nn.Sigmoid()))
    x = images().float()
    fused = bnext.fuse(plain, x)
    assert fused.block[1].activation == "sigmoid"
    torch.testing.assert_close(fused(x), plain(x))


def test_hooks_on_all_modules_are_refused() -> None:
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    try:
        with pytest.raises(ValueError, match="expected no global module hooks"):
            bnext.fuse(nn.Sequential(conv(), norm()), images())
    finally:
        hook.remove()


@pytest.mark.parametrize("place", [0, 1, None])
def test_a_forward_that_was_given_is_refused(place: int | None) -> None:
    plain = nn.Sequential(norm(), nn.ReLU()).double()
    with_forward(plain if place is None else plain[place], 2.0)
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(ValueError, match="expected modules with the forward of their class"):
        bnext.fuse(plain, images())
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)


def test_fused_again_and_converted() -> None:
    plain = make(lambda: nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm(), nn.Tanh()))
    once = bnext.fuse(plain, images())
    for network in (bnext.fuse(once, images()), bnext.convert(copy.deepcopy(once))):
        torch.testing.assert_close(step(network, images()), step(plain, images()), **CLOSE)
