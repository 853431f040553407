"""bnext.fuse of networks that do what a graph does not keep: whatever it makes of them, it does the same."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node

import bnext
from bnext.networks.equality import Behaviour
from fusing import counts
from graphless import NETS, block, conv, norm, with_forward
from networks import CLOSE, Net, images, make, step


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
        plain.train(training)
        fused.train(training)
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
    assert counts(fused.block) == {"norm+sigmoid": 1}
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


class Choosing(nn.Module):
    """Decides when it is made which of its methods forward is, as timm's FasterNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = norm(), nn.ReLU()
        self.forward = self.forward_of_all

    def forward_of_all(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


def test_a_forward_that_is_a_method_of_the_same() -> None:
    plain = make(lambda: nn.Sequential(Choosing(), conv(), norm(), nn.Tanh()))
    fused = bnext.fuse(plain, images())
    assert counts(fused) == {"norm+relu": 1, "norm+tanh": 1}
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)
    alone = bnext.fuse(plain[0], images())
    assert alone.forward.__self__ is alone and isinstance(alone.norm, bnext.BatchNorm2d)
    torch.testing.assert_close(step(alone, images()), step(plain[0], images()), **CLOSE)
    stranger = make(lambda: nn.Sequential(Choosing()))
    stranger[0].forward = plain[0].forward
    with pytest.raises(ValueError, match="expected modules with the forward of their class"):
        bnext.fuse(stranger, images())


def requiring_grad(net: Net, x: Tensor) -> Tensor:
    if net.training:
        x.requires_grad = True  # as wav2vec 2.0 for checkpoints; only leaves may
    return net.block(x)


def test_a_forward_that_takes_leaves_alone() -> None:
    plain = make(lambda: Net(requiring_grad, block=nn.Sequential(conv(), norm(), nn.ReLU())))
    fused = bnext.fuse(plain, images())
    assert counts(fused.block) == {"norm+relu": 1}
    torch.testing.assert_close(fused(images()), plain(images()), **CLOSE)


def test_fused_again_and_converted() -> None:
    plain = make(lambda: nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm(), nn.Tanh()))
    once = bnext.fuse(plain, images())
    for network in (bnext.fuse(once, images()), bnext.convert(copy.deepcopy(once))):
        torch.testing.assert_close(step(network, images()), step(plain, images()), **CLOSE)


@dataclass
class Output:
    y: Tensor


class Plain:
    """With itself in it."""

    def __init__(self, y: Tensor) -> None:
        self.inner, self.n, self.me = [Output(y)], len(y), self


class Slotted:
    __slots__ = ("y",)

    def __init__(self, y: Tensor) -> None:
        self.y = y


class Named(OrderedDict[str, Tensor]):
    """With attributes besides, as outputs of transformers."""

    def __init__(self, y: Tensor) -> None:
        super().__init__(y=y)
        self.n = 1


class Registered(Named):
    pass


register_pytree_node(Registered, lambda y: ([*y.values()], None), lambda values, _: Registered(*values))


# How a network may give y, and where it is found again.
OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dataclass": (Output, lambda out: out.y),
    "object": (lambda y: {"all": [Plain(y)]}, lambda out: out["all"][0].inner[0].y),
    "slots": (Slotted, lambda out: out.y),
    "dictionary": (Named, lambda out: out["y"]),
    "registered": (Registered, lambda out: out["y"]),
    "partial": (lambda y: partial(torch.add, y), lambda out: out.args[0]),
    "distribution": (lambda y: Normal(y, 1.0), lambda out: out.loc),
    "sparse": (Tensor.to_sparse, Tensor.to_dense),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_networks_that_give_objects(name: str) -> None:
    """They are compared by what is in them."""
    output, y_of = OUTPUTS[name]
    plain = Net(lambda net, x: output(net.block(x)), block=block()).double().eval()
    fused = bnext.fuse(plain, images())
    assert sum(counts(fused.block).values()) == 1
    torch.testing.assert_close(y_of(fused(images())), y_of(plain(images())), **CLOSE)
    wrong = Net(lambda net, x: output(F.softsign(net.block(x))), block=plain.block)
    assert "differs" in str(Behaviour(plain, (images(),)).difference(wrong))
    cut = Net(lambda net, x: output(net.block(x).detach()), block=plain.block)
    assert "gradient" in str(Behaviour(plain, (images(),)).difference(cut))
