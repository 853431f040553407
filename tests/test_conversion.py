"""bnext.convert and bnext.restore: layers of a network change their class and nothing else."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnext
from bnext.networks.conversion import OUR_ATTRIBUTES, NormActivation
from cases import ACTIVE, Active
from layers import CLOSE_OF_A_LAYER, Pair, every_option, every_pair, inputs, layer_step
from networks import CLOSE, NETWORKS, Net, Unlike, every_network, images, make, step

OURS = (bnext.BatchNorm1d, bnext.BatchNorm2d, bnext.BatchNorm3d)


def kinds(network: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in network.modules()]


@every_option
@every_pair
def test_a_layer_there_and_back(pair: Pair, options: dict[str, object], device: str) -> None:
    layer = pair[1](5, device=device, dtype=torch.float64, **options)
    plain = copy.deepcopy(layer)
    for expected in (pair[0], pair[1], pair[0]):
        converted = bnext.convert(layer) if expected is pair[0] else bnext.restore(layer)
        assert converted is layer and type(layer) is expected
        for x in inputs(pair, device):
            torch.testing.assert_close(layer_step(layer, x), layer_step(plain, x), **CLOSE_OF_A_LAYER)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), **CLOSE_OF_A_LAYER)
    assert repr(layer) == repr(plain)
    assert vars(bnext.restore(layer)).keys() == vars(plain).keys()


@every_network
def test_a_network_there_and_back(network: Callable[[], nn.Module]) -> None:
    plain = make(network)
    converted = copy.deepcopy(plain)
    objects, parameters = [*converted.modules()], [*converted.parameters()]
    assert bnext.convert(converted) is converted
    assert all(a is b for a, b in zip(converted.modules(), objects, strict=True))
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert sum(isinstance(module, OURS) for module in objects) == sum(
        isinstance(module, nn.BatchNorm2d) for module in plain.modules()
    )
    for training in (True, False, True):
        plain.train(training)
        converted.train(training)
        torch.testing.assert_close(step(converted, images()), step(plain, images()), **CLOSE)
    assert bnext.restore(converted) is converted
    assert kinds(converted) == kinds(plain)


def test_what_a_layer_carries_stays() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    layer, seen = network[1].eval(), []
    layer.weight.requires_grad_(False)
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer.note = "mine"
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    bnext.convert(network)
    assert type(layer) is bnext.BatchNorm2d and layer is network[1]
    assert not layer.training and not layer.weight.requires_grad and layer.note == "mine"
    before = layer.bias.clone()
    network(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert seen == [1] and not torch.equal(layer.bias, before)


@pytest.mark.parametrize("layer", [Unlike(3), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)])
def test_what_is_something_else_stays(layer: nn.Module) -> None:
    before = type(layer)
    assert type(bnext.convert(layer)) is before and type(bnext.restore(layer)) is before


def test_a_lazy_layer_once_it_knows_its_channels() -> None:
    network = nn.Sequential(nn.LazyBatchNorm2d())
    network(torch.ones(2, 3, 4, 4))
    assert type(bnext.convert(network)[0]) is bnext.BatchNorm2d


def test_a_layer_in_two_places() -> None:
    layer = bnext.BatchNorm2d(3, activation="relu")
    network = nn.ModuleDict({"a": layer, "b": layer, "c": nn.ModuleList([layer])})
    bnext.restore(network)
    assert network["a"] is network["b"] is network["c"][0] and isinstance(network["a"], NormActivation)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("active", ACTIVE, ids=str)
def test_restored_activations(active: Active, with_residual: bool, training: bool) -> None:
    layer = bnext.BatchNorm2d(3, activation=active.activation, activation_param=active.activation_param)
    ours = Net(lambda net, x: net.norm(x, *([x.flip(2)] if with_residual else [])), norm=layer).double()
    ours.train(training)
    theirs = copy.deepcopy(ours)
    assert bnext.restore(theirs) is theirs
    assert type(theirs.norm.norm) is nn.BatchNorm2d and theirs.norm.training == training
    assert repr(theirs.norm.activation) == repr(active.module())
    one, other = step(ours, images()), step(theirs, images())
    torch.testing.assert_close(
        {name.replace("norm.norm", "norm"): g for name, g in other.items()}, one, **CLOSE
    )


def test_a_layer_by_itself() -> None:
    layer = bnext.BatchNorm2d(3, activation="tanh")
    restored = bnext.restore(layer)
    assert isinstance(restored, NormActivation) and restored.norm is layer and type(layer) is nn.BatchNorm2d


def test_restore_twice_and_convert_again() -> None:
    network = nn.Sequential(bnext.BatchNorm2d(3, activation="relu"))
    once = copy.deepcopy(bnext.restore(network))
    assert kinds(bnext.restore(network)) == kinds(once)
    bnext.convert(network)
    assert type(network[0].norm) is bnext.BatchNorm2d and network[0].norm.activation is None
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(network(x), once(x))


def test_what_knows_torchs_alone() -> None:
    """Each of these goes by the class and would lose the activation without a word."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), bnext.BatchNorm2d(4, activation="relu")).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = network(x)
    assert expected.min() == 0
    bnext.restore(network)
    torch.testing.assert_close(network(x), expected)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    assert type(synchronized[1].norm) is nn.SyncBatchNorm and type(synchronized[1].activation) is nn.ReLU
    folded = nn.utils.fusion.fuse_conv_bn_eval(network[0], network[1].norm)
    torch.testing.assert_close(F.relu(folded(x)), expected)


def test_what_torch_cannot_do() -> None:
    network = nn.Sequential(
        bnext.BatchNorm2d(3, activation="relu"), bnext.BatchNorm2d(3, unbiased_running_var=False)
    )
    before = kinds(network)
    with pytest.raises(ValueError, match=r"expected unbiased_running_var=True.*but got False in '1'"):
        bnext.restore(network)
    assert kinds(network) == before and network[0].activation == "relu"


@pytest.mark.parametrize("attribute", OUR_ATTRIBUTES)
def test_a_layer_that_has_an_attribute_of_ours_is_not_converted(attribute: str) -> None:
    """Somebody's own: a tag, or a child, which must not become what ours means by it."""
    for given in ("relu", nn.ReLU()):
        network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
        setattr(network[1], attribute, given)
        with pytest.raises(ValueError, match=f"expected no attribute {attribute} of torch's layer '1'"):
            bnext.convert(network)
        assert [type(layer) for layer in network] == [nn.BatchNorm2d, nn.BatchNorm2d]
        assert getattr(network[1], attribute) is given


class OfOurs(bnext.BatchNorm2d):
    pass


def test_what_would_lose_something_is_not_restored() -> None:
    hooked = bnext.BatchNorm2d(3, activation="relu")
    hooked.register_forward_hook(lambda layer, args, y: y * 2)
    for layer, message in (
        (hooked, "expected no hooks on a layer with an activation, but '1' has some"),
        (OfOurs(3, activation="relu"), "expected layers of bnext's classes, but '1' is a OfOurs"),
    ):
        network = nn.Sequential(bnext.BatchNorm2d(3), layer)
        before = kinds(network)
        with pytest.raises(ValueError, match=message):
            bnext.restore(network)
        assert kinds(network) == before and layer.activation == "relu"


HOLD: dict[str, Callable[[nn.Module], object]] = {
    "itself": lambda layer: layer,
    "list": lambda layer: [layer],
    "value": lambda layer: {"first": layer},
    "key": lambda layer: {layer: "first"},
    "pairs": lambda layer: [(nn.ReLU(), layer)],
    "deeper": lambda layer: {"first": deque([frozenset([layer])])},
    "object": lambda layer: types.SimpleNamespace(first=[layer]),
    "weak reference": weakref.ref,
    "beside much": lambda layer: {"first": [layer], "vocabulary": list(range(200_000))},
    "bound method": lambda layer: layer.forward,
    "partial": lambda layer: functools.partial(nn.Module.__call__, layer),
    "closure": lambda layer: lambda x: layer(x),
    "default": lambda layer: lambda x, norm=layer: norm(x),
}


@pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD)
def test_a_layer_that_is_held_in_another_way_is_not_restored(hold: Callable[[nn.Module], object]) -> None:
    network = nn.Sequential(bnext.BatchNorm2d(3, activation="silu"), nn.BatchNorm2d(3))
    network.__dict__["way"] = hold(network[0])
    with pytest.raises(ValueError, match="but '0' is held in another way too"):
        bnext.restore(network)
    assert type(network[0]) is bnext.BatchNorm2d and network[0].activation == "silu"
    network[0].activation = None
    assert type(bnext.restore(network)[0]) is nn.BatchNorm2d


def test_a_fused_network_is_not_restored() -> None:
    network = make(NETWORKS["torchvision"])
    fused = bnext.fuse(network, images())
    for given in (fused, nn.Sequential(fused), copy.deepcopy(fused)):
        with pytest.raises(ValueError, match=r"expected a module that bnext.fuse has not made"):
            bnext.restore(given)


@pytest.mark.parametrize(
    "function", [bnext.convert, bnext.restore, bnext.synchronize, bnext.freeze, bnext.unfreeze, bnext.fuse]
)
def test_what_is_no_module(function: Callable[..., object]) -> None:
    for given in (bnext.BatchNorm2d, torch.ones(3)):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, but got (type|Tensor)"):
            function(given)
