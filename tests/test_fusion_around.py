"""bnext.fuse and what is around a forward: the modules in it, other calls of them, what forward leaves behind."""

from __future__ import annotations

import copy
import io
import logging
import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bnext
from bnext.networks import randomness
from bnext.networks.fused_forward import FusedForward
from fusing import counts
from graphless import block, conv, norm
from networks import CLOSE, NETWORKS, Net, images, make, step


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Headed(nn.Module):
    """With a method that stops before the head, as feature extractors have one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.head = conv(), norm(), nn.SiLU(), nn.Conv2d(3, 2, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_parts_are_what_they_were(network: Callable[[], nn.Module]) -> None:
    """Called by themselves, whatever the graph around them has drawn into its calls of their layers."""
    plain = make(network).eval()
    fused = bnext.fuse(copy.deepcopy(plain), images())
    given: dict[str, Tensor] = {}
    hooks = []
    for name, part in plain.named_modules():

        def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            given.setdefault(name, args[0].clone())

        hooks.append(part.register_forward_pre_hook(note))
    plain(images())
    parts = dict(fused.named_modules())
    for hook in hooks:
        hook.remove()
    for name, part in plain.named_modules():
        torch.testing.assert_close(parts[name](given[name].clone()), part(given[name].clone()), **CLOSE)


def test_methods_are_what_they_were() -> None:
    plain = make(Headed).eval()
    fused = bnext.fuse(plain, images())
    assert counts(fused) == {"norm+silu": 1}
    torch.testing.assert_close(fused.features(images()), plain.features(images()), **CLOSE)


@pytest.mark.parametrize("end", [2, 3, 5])
def test_what_is_made_of_children_is_of_their_class(end: int) -> None:
    plain = make(lambda: nn.Sequential(*block(), *block())).eval()
    fused = bnext.fuse(plain, images())
    assert counts(fused) == {"norm+sigmoid": 2}
    for part in (fused[:end], nn.Sequential(*[*fused.children()][:end])):
        assert type(part) is nn.Sequential
        torch.testing.assert_close(part(images()), plain[:end](images()), **CLOSE)
    assert isinstance(copy.deepcopy(fused), FusedForward)


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand([])),
    "python": random.random,
    "numpy": np.random.rand,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_layers_that_are_dropped_at_random_are_dropped(draw: Callable[[], float]) -> None:
    """In training, with a probability below the first number of any seed that graphs are tried with."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return x if net.training and draw() < 0.3 else F.relu(net.norm(net.conv(x)) + x)

    plain = nn.Sequential(Net(forward, norm=norm(), conv=conv()), block()).double()
    x, before = images(), randomness.state()
    fused = bnext.fuse(plain, x)
    assert randomness.state() == before
    assert counts(fused[1]) == {"norm+sigmoid": 1}
    kept = 0
    for seed in range(30):
        results = []
        for network in (fused, plain):
            randomness.seed(seed)
            results.append(step(network, x))
        torch.testing.assert_close(*results, **CLOSE)
        kept += "0.conv.weight" in results[0] and bool(results[0]["0.conv.weight"].any())
    assert 10 <= kept < 30


def test_what_forward_leaves_in_attributes() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.block(x)
        net.penalty = y.square().mean()
        net.seen.append(y.shape)
        return y

    plain = Net(forward, block=block()).double()
    plain.penalty, plain.seen = None, []
    fused = bnext.fuse(plain, images())
    assert plain.penalty is None and plain.seen == []
    assert counts(fused.block) == {"norm+sigmoid": 1}
    fused(images())
    plain(images())
    torch.testing.assert_close(fused.penalty, plain.penalty, **CLOSE)
    assert fused.seen == plain.seen and fused.penalty.requires_grad


@pytest.mark.parametrize("name", ["add", "add_", "plus"])
def test_a_module_is_no_addition_whatever_its_name(name: str) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return F.relu(getattr(net, name)(net.norm(x), x))

    plain, seen = Net(forward, norm=norm(), **{name: Add()}).double(), []
    plain.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(name))
    fused = bnext.fuse(plain, images())
    assert counts(fused)["norm"] == 1
    seen.clear()
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)
    assert seen == [name, name]


def counted(net: Counted, y: Tensor) -> None:
    Counted.calls += 1


def cached(net: Counted, y: Tensor) -> None:
    Counted.cache.y = y


def kept(net: Counted, y: Tensor) -> None:
    KEPT["y"] = y


class Counted(nn.Module):
    calls, cache = 0, SimpleNamespace(y=None)

    def __init__(self, leave: Callable[[Counted, Tensor], None]) -> None:
        super().__init__()
        self.leave, self.block = leave, block()

    def forward(self, x: Tensor) -> Tensor:
        self.leave(self, y := F.relu(self.block(x)))
        return y


class Clocked(nn.Sequential):
    clock, log = SimpleNamespace(ticks=0), logging.getLogger("clocked")

    def forward(self, x: Tensor) -> Tensor:
        self.clock.ticks += 1
        self.log.warning("tick")
        return super().forward(x)


def test_what_a_class_holds_for_anybody_hinders_nothing() -> None:
    fused = bnext.fuse(Clocked(*block()).double(), images())
    assert counts(fused) == {"norm+sigmoid": 1}


KEPT: dict[str, Tensor] = {}


@pytest.mark.parametrize("leave", [counted, cached, kept])
def test_what_forward_leaves_elsewhere(leave: Callable[[Counted, Tensor], None]) -> None:
    """In its class, in what is there, or a tensor in a global: it stays the forward that does so."""
    fused = bnext.fuse(Counted(leave).double(), images())
    assert type(fused) is Counted and counts(fused.block) == {"norm+sigmoid": 1}
    Counted.calls, Counted.cache.y = 0, None
    KEPT.clear()
    y = fused(images())
    assert Counted.calls == 1 or Counted.cache.y is y or KEPT["y"] is y


def test_hooks_of_saved_tensors_in_the_forward() -> None:
    packed: list[Tensor] = []

    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            return net.block(x)

    fused = bnext.fuse(Net(forward, block=block()).double(), images())
    assert counts(fused.block) == {"norm+sigmoid": 1}
    packed.clear()
    fused(images())
    assert packed


def test_a_network_that_is_a_graph() -> None:
    plain = make(NETWORKS["torchvision"])
    traced = fx.symbolic_trace(copy.deepcopy(plain))
    text = traced.code
    fused = bnext.fuse(traced, images())
    assert isinstance(fused, fx.GraphModule) and traced.code == text
    assert counts(fused) == counts(bnext.fuse(plain, images()))
    expected = step(plain, images())
    torch.testing.assert_close(step(fused, images()), expected, **CLOSE)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(step(loaded, images()), step(copy.deepcopy(fused), images()), **CLOSE)
