"""bnext.fuse: what stays as it is because it would not be the same, and what cannot be fused at all."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import bnext
from fusing import counts
from networks import CLOSE, Net, Unlike, images, step
from random_examples import SETTINGS


def norm(**options: float) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(3, **options)


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return module


def written_between(net: Net, x: Tensor) -> Tensor:
    h = x * 1
    z = net.norm(x)
    h.mul_(2)
    return z + h


def read_afterwards(net: Net, x: Tensor) -> Tensor:
    h = x * 1
    g = h.view_as(h)
    h += net.norm(x)
    return h + g


def activated_twice(net: Net, x: Tensor) -> Tensor:
    z = net.norm(x)
    return F.relu(z) + torch.sigmoid(z)


# Forward, its modules, and what stands in the fused graph.
STAYS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "added to a scalar": (lambda: Net(lambda net, x: net.norm(x) + 1.0, norm=norm()), {"norm": 1, "add": 1}),
    "a residual that is broadcast": (
        lambda: Net(lambda net, x: net.norm(x) + x.mean((2, 3), keepdim=True), norm=norm()),
        {"norm": 1, "add": 1},
    ),
    "a residual that is larger": (
        lambda: Net(lambda net, x: net.norm(x[:1]) + x, norm=norm()),
        {"norm": 1, "add": 1},
    ),
    "a residual of another dtype": (
        lambda: Net(lambda net, x: net.norm(x) + x.float(), norm=norm()),
        {"norm": 1, "add": 1},
    ),
    "a factor": (
        lambda: Net(lambda net, x: torch.add(net.norm(x), x, alpha=2), norm=norm()),
        {"norm": 1, "add": 1},
    ),
    "added to itself": (
        lambda: Net(lambda net, x: (z := net.norm(x)) + z, norm=norm()),
        {"norm": 1, "add": 1},
    ),
    "a residual that comes later": (
        lambda: Net(lambda net, x: net.norm(x) + x.exp(), norm=norm()),
        {"norm": 1, "add": 1},
    ),
    "read twice": (lambda: Net(activated_twice, norm=norm()), {"norm": 1, "activation": 1, "add": 1}),
    "called twice": (
        lambda: Net(lambda net, x: F.relu(net.norm(F.relu(net.norm(x)))), norm=norm()),
        {"norm": 2, "activation": 2},
    ),
    "a hook on the batch norm": (
        lambda: Net(lambda net, x: F.relu(net.norm(x)), norm=with_hook(norm())),
        {"norm": 1, "activation": 1},
    ),
    "a hook on the activation": (
        lambda: Net(lambda net, x: net.f(net.norm(x)), norm=norm(), f=with_hook(nn.ReLU())),
        {"norm": 1, "activation": 1},
    ),
    "gelu by tanh": (
        lambda: Net(lambda net, x: F.gelu(net.norm(x), approximate="tanh"), norm=norm()),
        {"norm": 1},
    ),
    "gelu by tanh, a module": (
        lambda: Net(lambda net, x: net.f(net.norm(x)), norm=norm(), f=nn.GELU("tanh")),
        {"norm": 1},
    ),
    "a subclass": (lambda: Net(lambda net, x: F.relu(net.norm(x)), norm=Unlike(3)), {"activation": 1}),
    "a residual written to in between": (lambda: Net(written_between, norm=norm()), {"norm": 1, "add": 1}),
    "a residual written over and read": (lambda: Net(read_afterwards, norm=norm()), {"norm": 1, "add": 2}),
    "an activation that it has": (
        lambda: Net(lambda net, x: F.relu(net.norm(x)), norm=bnext.BatchNorm2d(3, activation="tanh")),
        {"norm+tanh": 1, "activation": 1},
    ),
    "over its input": (
        lambda: Net(lambda net, x: F.relu(net.norm(x * 1)), norm=bnext.BatchNorm2d(3, inplace=True)),
        {"norm": 1, "activation": 1},
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name: str) -> None:
    """And nothing else does: what follows it in the same graph is drawn in."""
    make, expected = STAYS[name]
    plain = nn.Sequential(make(), norm(), nn.ReLU()).double()
    fused = bnext.fuse(copy.deepcopy(plain), images())
    found = counts(fused)
    assert found.pop("norm+relu") == 1
    assert {key: found.get(key, 0) for key in expected} == expected
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


@pytest.mark.parametrize("example", [(), (torch.ones(2, 5, 4, 4),), (torch.ones(1, 3, 1, 1),)])
def test_an_example_that_does_not_fit(example: tuple[Tensor, ...]) -> None:
    network = Net(lambda net, x: F.relu(net.norm(x)), norm=norm())
    with pytest.raises(ValueError, match="expected a module that can be copied and example_inputs of which"):
        bnext.fuse(network, *example)


@pytest.mark.parametrize(
    ("example", "message"),
    [(torch.zeros(2, 3, 4, 4), "the same value everywhere"), (torch.full((2, 3, 4, 4), torch.nan), "NaNs")],
)
def test_an_example_that_tells_nothing(example: Tensor, message: str) -> None:
    network = Net(lambda net, x: F.relu(net.norm(x)), norm=norm())
    with pytest.raises(
        ValueError, match=f"expected example_inputs that tell networks apart, but .*{message}"
    ):
        bnext.fuse(network, example)


OPERATIONS = {
    "norm": lambda net, a, b: net.norm1(a),
    "another norm": lambda net, a, b: net.norm2(a),
    "relu": lambda net, a, b: F.relu(a),
    "relu over": lambda net, a, b: a.relu_(),
    "relu module over": lambda net, a, b: net.f(a),
    "silu over": lambda net, a, b: F.silu(a, inplace=True),
    "sigmoid": lambda net, a, b: a.sigmoid(),
    "add": lambda net, a, b: a + b,
    "add over": lambda net, a, b: a.__iadd__(b),
    "add_": lambda net, a, b: a.add_(b),
    "mean": lambda net, a, b: a.mean((2, 3), keepdim=True),
    "view": lambda net, a, b: a.view_as(a),
    "double over": lambda net, a, b: a.mul_(2),
}
programs = st.lists(
    st.tuples(st.sampled_from([*OPERATIONS]), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=8
)


@given(program=programs, results=st.lists(st.integers(0, 9), min_size=1, max_size=3))
@settings(SETTINGS, max_examples=100)
def test_any_program(program: list[tuple[str, int, int]], results: list[int]) -> None:
    """Of batch norms, additions and activations, over memory or not, every value of which may be read again."""

    def run(net: Net, x: Tensor) -> list[Tensor]:
        values = [x * 1]
        for name, a, b in program:
            values.append(OPERATIONS[name](net, values[-1 - a % len(values)], values[-1 - b % len(values)]))
        return [values[-1], *(values[place % len(values)] * 1 for place in results)]

    plain = Net(run, norm1=norm(), norm2=norm(momentum=0.3), f=nn.ReLU(inplace=True)).double()
    fused = copy.deepcopy(plain)
    fused = bnext.fuse(fused, images()) if runs(plain) else None
    assume(fused is not None)
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)
    state = plain.state_dict()
    after = dict(fused.state_dict())  # of what is called
    torch.testing.assert_close(after, {name: state[name] for name in after}, **CLOSE)


def runs(plain: nn.Module) -> bool:
    """Whether torch can train the network: it may have written over what backward needs."""
    try:
        step(copy.deepcopy(plain), images())
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_without_values(device: str) -> None:
    network = nn.Sequential(norm(), nn.ReLU()).to(device)
    with pytest.raises(ValueError, match=r"with values, but tensors are on the meta device"):
        bnext.fuse(network, torch.empty(4, 3, 8, 8, device="meta"))
