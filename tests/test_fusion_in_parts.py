"""bnext.fuse of networks that are no single graph: what they consist of is fused, and nothing that is not known."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bnext
from bnext.networks.fused_forward import FusedForward
from fusing import counts
from networks import CLOSE, BasicBlock, FunctionalBlock, Net, Unlike, images, make, step

BLOCK = {"norm+relu": 1, "norm+add+relu": 1}


def until(net: Net, x: Tensor) -> Tensor:
    """Looks at values: torch.fx cannot trace it, and fake tensors do not get past the question."""
    y = net.block(x)
    return y * 2 if y.sum() > 0 else y


def by_type(net: Net, x: Tensor) -> Tensor:
    """Of Python's doing only, but not torch.fx's."""
    return net.block(x) if type(x) is not fx.Proxy and len(x) > 0 else x


def in_training(net: Net, x: Tensor) -> list[Tensor] | Tensor:
    y = net.block(x)
    return [y, net.other(x)] if net.training else y


def drops(net: Net, x: Tensor) -> Tensor:
    return F.dropout(net.block(x), 0.0, net.training)


def by_keyword(net: Net, x: Tensor) -> list[Tensor] | Tensor:
    y = net.block(x=x)
    return [y, net.other(x)] if net.training else y


# Each calls a block once.
WHOLE: dict[str, Callable[[Net, Tensor], object]] = {
    "values": until,
    "control flow": by_type,
    "other outputs in training": in_training,
    "the mode as an argument": drops,
    "a keyword": by_keyword,
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_blocks_are_fused(name: str) -> None:
    plain = make(lambda: Net(WHOLE[name], block=BasicBlock(3, 3), other=nn.BatchNorm2d(3)))
    fused = bnext.fuse(copy.deepcopy(plain), images())
    assert type(fused) is Net and isinstance(fused.block, FusedForward) and counts(fused.block) == BLOCK
    assert type(fused.other) is bnext.BatchNorm2d
    for training in (True, False, True):
        plain.train(training)
        fused.train(training)
        torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), **CLOSE)


def test_the_original_stays_and_shares() -> None:
    plain = make(lambda: Net(until, block=BasicBlock(3, 3), other=nn.BatchNorm2d(3)))
    before = [type(module) for module in plain.modules()]
    fused = bnext.fuse(plain, images())
    assert [type(module) for module in plain.modules()] == before
    mine, theirs = dict(fused.named_parameters()), dict(plain.named_parameters())
    assert mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)


class DropsPaths(nn.Module):
    """Asks for the mode, but has no batch norm: nobody needs to look into it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.9)) if self.training else x


def test_modules_without_a_batch_norm_may_do_what_they_like() -> None:
    network = Net(
        lambda net, x: F.relu(net.norm(net.drop(x)) + x), norm=nn.BatchNorm2d(3), drop=DropsPaths()
    ).double()
    fused = bnext.fuse(network, images())
    assert isinstance(fused, FusedForward) and counts(fused) == {"norm+add+relu": 1}
    for training in (True, False):
        network.train(training)
        fused.train(training)
        torch.manual_seed(5)
        expected = network(images())
        torch.manual_seed(5)
        torch.testing.assert_close(fused(images()), expected, **CLOSE)


def layers(seed: int = 0) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.GELU())


def one_after_another(net: Net, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
    return x * 1 if x.sum() > 0 else x


def called_and_picked(net: Net, x: Tensor) -> Tensor:
    return net.layers(x) + net.layers[1](x) if type(x) is not fx.Proxy and len(x) > 0 else x


def called_twice(net: Net, x: Tensor) -> Tensor:
    return net.layers(net.layers(x)) if type(x) is not fx.Proxy and len(x) > 0 else x


def called_by_name(net: Net, x: Tensor) -> Tensor:
    return net.layers(input=x) if type(x) is not fx.Proxy and len(x) > 0 else x


@pytest.mark.parametrize("function", [one_after_another, called_and_picked, called_twice, called_by_name])
def test_what_is_called_otherwise(function: Callable[[Net, Tensor], Tensor]) -> None:
    """An activation that is drawn in must not be applied by somebody else again."""
    plain = make(lambda: Net(function, layers=layers()))
    try:
        fused = bnext.fuse(copy.deepcopy(plain), images())
    except ValueError as error:
        assert function is called_and_picked and "computes the same with fused modules, but" in str(error)
        return
    assert type(fused.layers[1]) is bnext.BatchNorm2d
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


def test_a_module_of_which_more_is_used() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.block(x) * net.block.factor if type(x) is not fx.Proxy and len(x) > 0 else x

    network = Net(forward, block=BasicBlock(3, 3)).double()
    network.block.factor = 2.0
    fused = bnext.fuse(copy.deepcopy(network), images())
    assert counts(fused.block) == BLOCK and isinstance(fused.block, BasicBlock)
    torch.testing.assert_close(step(fused, images()), step(network, images()), **CLOSE)


def test_a_block_in_two_places() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.a(x) + net.b(x + 1) if type(x) is not fx.Proxy and len(x) > 0 else x

    block = FunctionalBlock(3, 3)
    plain = make(lambda: Net(forward, a=block, b=block))
    fused = bnext.fuse(copy.deepcopy(plain), images())
    assert fused.a is fused.b
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


def test_what_is_something_else_stays() -> None:
    network = Net(until, block=nn.ModuleList([Unlike(3), nn.SyncBatchNorm(3), nn.BatchNorm2d(3)]))
    network.function = lambda net, x: net.block[0](x) if x.sum() > 0 else net.block[2](x)
    fused = bnext.fuse(network, images().float())
    assert [type(layer) for layer in fused.block] == [Unlike, nn.SyncBatchNorm, bnext.BatchNorm2d]
    assert type(network.block[2]) is nn.BatchNorm2d


def test_a_batch_norm_by_itself() -> None:
    layer = nn.BatchNorm2d(3).double()
    fused = bnext.fuse(layer, images())
    assert type(fused) is bnext.BatchNorm2d and fused.weight is layer.weight and type(layer) is nn.BatchNorm2d


def test_nothing_to_fuse() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    fused = bnext.fuse(network, images().float())
    assert type(fused) is nn.Sequential and fused[0].weight is network[0].weight
