"""bnext.fuse of forwards whose other half is hidden while they are traced: behind a mode, a value, an attribute."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bnext
from bnext.networks.fused_forward import FusedForward
from fusing import counts
from graphless import Reversal, block, conv, norm
from networks import CLOSE, NETWORKS, Net, images, make, step


class Clip(Reversal):
    """Nothing that a loss of the usual size shows."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-10, 10)


def with_grad(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return F.relu(net.norm(net.conv(x)))


def without_autocast(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.relu(net.norm(net.conv(x)))


def data_with(net: Net, x: Tensor) -> Tensor:
    h = net.conv(x)
    h.data += net.norm.bias.view(-1, 1, 1)
    return F.relu(net.norm(h)) * h


def tagged(net: Net, x: Tensor) -> Tensor:
    y = net.block(x)
    y.tag = "tagged"
    return y


def by_dtype(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.norm(x))
    return y.float() if x.dtype in {torch.float16, torch.bfloat16} else y


def by_grad_mode(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.norm(x))
    return y if torch.is_grad_enabled() else y.softmax(1)


FORWARDS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a function": lambda net, x: F.relu(net.norm(Clip.apply(net.conv(x)))),
    "grad": with_grad,
    "no autocast": without_autocast,
    "data": data_with,
    "an attribute of a tensor": tagged,
    "a question for the dtype": by_dtype,
    "a question for the grad mode": by_grad_mode,
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())
def test_whatever_the_mode_around_fuse(
    forward: Callable[[Net, Tensor], Tensor], grad: bool, autocast: bool
) -> None:
    plain = Net(forward, norm=norm(), conv=conv(), block=block())
    x = images().float()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused = bnext.fuse(plain, x)
    with torch.no_grad():
        for network in (fused, plain):
            network.get_parameter("norm.bias").fill_(3)
    for network in (fused, plain):
        network.zero_grad()
        (network(x) * 1e4).sum().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in plain.parameters()]
    for parameter, gradient in zip(fused.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-1)
    fused.eval()
    plain.eval()
    for dtype in (torch.float32, torch.bfloat16):
        fused.to(dtype)
        plain.to(dtype)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                y, z = fused(x.to(dtype)), plain(x.to(dtype))
            assert (y.requires_grad, y.dtype, vars(y)) == (z.requires_grad, z.dtype, vars(z))
            torch.testing.assert_close(y, z, rtol=0.02, atol=0.1)


GENERATORS: dict[str, Callable[[], Callable[[], float]]] = {
    "python": lambda: random.Random(0).random,
    "numpy": lambda: np.random.default_rng(1).random,
    "numpy of old": lambda: np.random.RandomState(0).rand,
}


@pytest.mark.parametrize("made", GENERATORS.values(), ids=GENERATORS.keys())
def test_a_generator_of_its_own(made: Callable[[], Callable[[], float]]) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        draw = getattr(net.generator, "random", None) or net.generator.rand
        return x if net.training and draw() < 0.3 else F.relu(net.norm(net.conv(x)) + x)

    plain = Net(forward, norm=norm(), conv=conv()).double()
    plain.generator = made().__self__
    fused = bnext.fuse(plain, images())
    dropped = [int(torch.equal(fused(images()), images())) for _ in range(30)]
    assert 0 < sum(dropped) < 30


@pytest.mark.parametrize("place", ["namespace", "deque", "nested"])
def test_what_forward_leaves_anywhere(place: str) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.block(x)
        if place == "namespace":
            net.kept.loss = y.square().mean()
        elif place == "deque":
            net.kept.append(y.mean())
        else:
            net.kept["a"].append(1)
        return y

    plain = Net(forward, block=block()).double()
    plain.kept = {"namespace": SimpleNamespace(loss=None), "deque": deque(), "nested": {"a": []}}[place]
    fused = bnext.fuse(plain, images())
    fused(images())
    assert {"namespace": lambda k: k.loss is not None, "deque": len, "nested": lambda k: k["a"]}[place](
        fused.kept
    )


TENSORS = {
    "sparse": lambda: torch.eye(5).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "nan": lambda: torch.full((3,), float("nan")),
}


class Slots:
    """Answers for every name, with the wrong error."""

    __slots__ = ()

    def __getattr__(self, name: str) -> object:
        raise KeyError(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Slots:
        return self


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())
def test_tensors_in_attributes_are_no_hindrance(tensor: Callable[[], Tensor]) -> None:
    plain = block().double()
    plain.kept, plain.strange = tensor(), Slots()
    assert counts(bnext.fuse(plain, images())) == {"norm+sigmoid": 1}


def test_a_graph_with_an_attribute() -> None:
    plain = nn.Sequential(fx.symbolic_trace(nn.Sequential(norm(), nn.ReLU()))).double()
    plain[0].kept = "this"
    fused = bnext.fuse(plain, images())
    assert counts(fused) == {"norm+relu": 1} and fused[0].kept == "this"


def test_a_head_that_is_put_in_later() -> None:
    plain = Net(lambda net, x: net.head(F.relu(net.norm(x)).mean((2, 3))), norm=norm(), head=nn.Identity())
    fused = bnext.fuse(plain.double(), images())
    fused.head = plain.head = nn.Linear(3, 7).double()
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


def test_relu6_that_ends_elsewhere() -> None:
    plain = nn.Sequential(norm(), nn.ReLU6()).double()
    plain[1].max_val = 8.0
    fused = bnext.fuse(plain, images())
    with torch.no_grad():
        plain[0].weight.fill_(10)
    assert torch.equal(fused(images()).max(), plain(images()).max()) and fused(images()).max() == 8


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gain) if self.training else x.mul_(1 * self.gain)


def test_a_module_that_writes() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.conv(x)
        z = net.norm(x)
        net.gate(h)
        return F.relu(z + h)

    plain = Net(forward, norm=norm(), conv=conv(), gate=Gate()).double()
    fused = bnext.fuse(plain, images())
    plain.gate.gain.fill_(3)
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


def test_copies_are_of_one_class() -> None:
    fused = bnext.fuse(make(NETWORKS["torchvision"]), images())
    copies = [copy.deepcopy(fused), copy.deepcopy(fused)]
    assert all(type(one) is type(fused) for one in copies)
    torch.func.stack_module_state(copies)
    replica = fused._replicate_for_data_parallel()
    assert isinstance(replica, FusedForward) and isinstance(replica, nn.Sequential)


class Copied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = norm()

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        made = type(self)().to(self.norm.weight.dtype)
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class Closed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = norm()
        self.act = lambda x: F.relu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def hooked_graph() -> nn.Module:
    traced = fx.symbolic_trace(nn.Sequential(norm(), nn.ReLU()))
    traced.register_forward_hook(lambda module, args, y: y * 2)
    return traced


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "copies itself": (Copied, "a copy has a parameter 'norm.weight' of its own"),
    "a function around a module": (Closed, "expected functions in attributes that hold no modules"),
    "a graph with hooks": (hooked_graph, "a copy of '' lacks its _forward_hooks"),
    "an output that tells nothing": (
        lambda: Net(lambda net, x: (y for y in [net.norm(x)]), norm=norm()),
        "nobody can compare as it is, output of 0: TypeError: a generator is equal to nothing but itself",
    ),
    "torch.jit": (
        lambda: nn.Sequential(norm(), torch.jit.script(nn.ReLU())),
        "expected modules of Python, but '1' is a RecursiveScriptModule of torch.jit",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    made, message = REFUSED[name]
    module = made().double()
    before = copy.copy(module.state_dict())
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(ValueError, match=message):
        bnext.fuse(module, images())
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_an_example_that_is_empty() -> None:
    with pytest.raises(ValueError, match="same value everywhere"):
        bnext.fuse(Net(lambda net, x: x * 1, norm=norm()).double(), torch.empty(0, 4))
