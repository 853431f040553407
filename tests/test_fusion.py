"""bnext.fuse: the same network with fewer passes, of networks as the field writes them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnext
from bnext.networks.fused_forward import FusedForward
from cases import ACTIVE, Active
from fusing import counts
from networks import CLOSE, NETWORKS, BasicBlock, Net, every_network, images, make, stack, step

EXPECTED = {
    "torchvision": {"norm": 1, "norm+leaky_relu": 1, "norm+relu": 2, "norm+add+relu": 2},
    "functional": {"norm": 1, "norm+leaky_relu": 1, "norm+relu": 2, "norm+add+relu": 2},
    "pre-activation": {"norm+leaky_relu": 1, "norm+relu": 2, "add": 1},
    "inverted": {"norm+leaky_relu": 1, "norm+hardswish": 1, "norm+silu": 1, "norm+add": 1},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_drawn_in(name: str) -> None:
    assert counts(bnext.fuse(make(NETWORKS[name]), images())) == EXPECTED[name]


@every_network
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_trains_and_infers_as_before(network: Callable[[], nn.Module], layout: torch.memory_format) -> None:
    plain = make(network).to(memory_format=layout)
    fused = bnext.fuse(copy.deepcopy(plain), images())
    x = images().contiguous(memory_format=layout)
    for training in (True, True, False, True):
        plain.train(training)
        fused.train(training)
        torch.testing.assert_close(step(fused, x), step(plain, x), **CLOSE)
    torch.testing.assert_close(dict(fused.state_dict()), dict(plain.state_dict()), **CLOSE)


@every_network
def test_the_original_stays_and_shares(network: Callable[[], nn.Module]) -> None:
    original = make(network).eval()
    before, types = copy.deepcopy(original), [type(module) for module in original.modules()]
    fused = bnext.fuse(original, images())
    assert not fused.training and isinstance(fused, FusedForward) and isinstance(fused, type(original))
    assert [type(module) for module in original.modules()] == types
    assert all(not module.training for module in original.modules())
    torch.testing.assert_close(original.state_dict(), before.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(step(original, images()), step(before, images()), rtol=0, atol=0)
    mine, theirs = dict(fused.named_parameters()), dict(original.named_parameters())
    assert mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    fused.train()
    step(fused, images())
    optimizer.step()
    assert not torch.equal(original[0].weight, before[0].weight)
    torch.testing.assert_close(dict(fused.state_dict()), dict(original.state_dict()), rtol=0, atol=0)
    assert original[1].num_batches_tracked == before[1].num_batches_tracked + 1


def test_copies_compute_and_count_alone() -> None:
    network, x = make(NETWORKS["torchvision"]), images()
    before, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    bnext.fuse(network, x)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)


FORMS: dict[str, Callable[[Active, bool], nn.Module]] = {
    "module": lambda active, inplace: Net(lambda net, x: net.f(net.norm(x)), f=active.module(inplace)),
    "function": lambda active, inplace: Net(lambda net, x: active.function(inplace)(net.norm(x))),
}
NEVER_IN_PLACE = {"gelu", "sigmoid", "tanh"}  # torch has no such argument


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize(
    ("active", "inplace"),
    [
        (active, over)
        for active in ACTIVE
        for over in (False, True)
        if not (over and active.activation in NEVER_IN_PLACE)
    ],
    ids=str,
)
def test_every_activation_in_every_form(
    active: Active, form: Callable[[Active, bool], nn.Module], inplace: bool
) -> None:
    network = form(active, inplace)
    network.add_module("norm", nn.BatchNorm2d(3))
    network.double()
    fused = bnext.fuse(network, images())
    assert counts(fused) == {f"norm+{active.activation}": 1}
    torch.testing.assert_close(step(fused, images()), step(network, images()), **CLOSE)


METHODS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": lambda z: z.relu_(),
    "relu ": torch.relu,
    "sigmoid": lambda z: z.sigmoid(),
    "sigmoid ": torch.sigmoid,
    "tanh": lambda z: z.tanh_(),
    "tanh ": torch.tanh,
    "leaky_relu": lambda z: F.leaky_relu(z, negative_slope=0.3),
    "elu": lambda z: F.elu(z, alpha=2),
    "relu6": lambda z: F.hardtanh(z, 0, 6),
    "relu6 ": lambda z: F.hardtanh_(z, max_val=6.0, min_val=0.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_and_keywords(name: str) -> None:
    network = Net(lambda net, x: METHODS[name](net.norm(x)), norm=nn.BatchNorm2d(3)).double()
    fused = bnext.fuse(network, images())
    assert counts(fused) == {f"norm+{name.strip()}": 1}
    torch.testing.assert_close(step(fused, images()), step(network, images()), **CLOSE)


@pytest.mark.parametrize("bounds", [(0, 6), (0.0, 6.0), (-1, 1), (0, 5)], ids=str)
def test_hardtanh_is_relu6_between_0_and_6(bounds: tuple[float, float]) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Hardtanh(*bounds)).double()
    fused = bnext.fuse(network, images())
    assert counts(fused) == ({"norm+relu6": 1} if bounds == (0, 6) else {"norm": 1})
    torch.testing.assert_close(step(fused, images()), step(network, images()), **CLOSE)


ADDITIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "function": torch.add,
    "named": lambda z, x: torch.add(input=z, other=x),
    "half named": lambda z, x: torch.add(x, other=z),
    "alpha": lambda z, x: torch.add(z, x, alpha=1),
    "method": lambda z, x: z.add_(other=x),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions(name: str) -> None:
    network = Net(lambda net, x: F.relu(ADDITIONS[name](net.norm(x), x)), norm=nn.BatchNorm2d(3)).double()
    fused = bnext.fuse(network, images())
    assert counts(fused) == {"norm+add+relu": 1}
    torch.testing.assert_close(step(fused, images()), step(network, images()), **CLOSE)


def test_modules_called_by_keyword() -> None:
    parts = {"norm": nn.BatchNorm2d(3), "f": nn.ReLU()}
    network = Net(lambda net, x: net.f(input=net.norm(input=x) + x), **parts).double()
    fused = bnext.fuse(network, images())
    assert counts(fused) == {"norm+add+relu": 1}
    torch.testing.assert_close(step(fused, images()), step(network, images()), **CLOSE)


@pytest.mark.parametrize("drop", [nn.Identity(), nn.Dropout(0.0), nn.Dropout2d(0, inplace=True)], ids=str)
def test_identities_stand_in_nobodys_way(drop: nn.Module) -> None:
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        return net.rest(net.f(net.drop(input=net.norm(x)) + net.rest(net.rest(input=x))))

    parts = {"norm": nn.BatchNorm2d(3), "f": nn.ReLU(), "drop": drop, "rest": nn.Identity()}
    network = Net(forward, **parts).double()
    fused = bnext.fuse(network, images())
    assert counts(fused) == {"norm+add+relu": 1}
    torch.testing.assert_close(step(fused, images()), step(network, images()), **CLOSE)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_copies_and_loads() -> None:
    fused = bnext.fuse(make(NETWORKS["torchvision"]), images())
    expected = step(copy.deepcopy(fused), images())
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded, FusedForward) and isinstance(loaded, nn.Sequential)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, images()).items()}
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(step(loaded, images()), expected, rtol=0, atol=0)


def test_blocks_one_by_one() -> None:
    plain = make(lambda: stack(BasicBlock(4, 4), BasicBlock(4, 4)))
    fused = copy.deepcopy(plain)
    for place in (3, 4):
        fused[place] = bnext.fuse(fused[place], torch.randn(2, 4, 8, 10, dtype=torch.float64))
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)
    assert plain.state_dict().keys() == fused.state_dict().keys()


def test_a_residual_of_another_batch_size() -> None:
    """Sizes of the example decide which additions are of equal tensors, not the sizes of later calls."""
    fused = bnext.fuse(make(NETWORKS["torchvision"]), images())
    assert fused(images()[:2]).shape == (2, 3)


def test_the_network_says_what_is_drawn_in() -> None:
    """Beside what its own class says."""
    parts = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ELU(2.0), BasicBlock(3, 3)]
    network = nn.Sequential(*parts).double()
    fused = bnext.fuse(network, images())
    drawn = ["1 + elu(2.0)", "3.bn1 + relu", "3.bn2 + residual + relu"]
    for one in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        lines = repr(one).splitlines()
        assert lines[1:4] == [f"  drawn in: {what}" for what in drawn] and "(0): Conv2d" in lines[4]
    assert "drawn in" not in repr(fused[3]) + repr(network)
