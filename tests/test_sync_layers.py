"""Synchronized layers in one process: what they are, what makes them, and the way back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import bnext
from bnext.networks.conversion import NormActivation
from fusing import counts
from networks import Unlike

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.BatchNorm2d(3),
        bnext.BatchNorm2d(3, activation="leaky_relu", activation_param=0.2),
        nn.SyncBatchNorm(3),
    )


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_the_layer_of_one_process(training: bool) -> None:
    ours = bnext.SyncBatchNorm(3, activation="silu").train(training)
    alone = bnext.BatchNorm2d(3, activation="silu").train(training)
    for x in (X, X + 1):
        assert torch.equal(ours(x, X), alone(x, X))
    for one, other in zip(ours.buffers(), alone.buffers(), strict=True):
        assert torch.equal(one, other)


def test_any_number_of_dimensions_from_two() -> None:
    layer = bnext.SyncBatchNorm(3)
    for shape in ((4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match="expected at least 2D input"):
        layer(torch.randn(3))


def test_arguments_and_state_are_torchs() -> None:
    given = (3, 1e-3, 0.3, True, True, None)
    theirs = nn.SyncBatchNorm(*given, dtype=torch.float64)
    ours = bnext.SyncBatchNorm(*given, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    assert ours.process_group is None and ours.weight.dtype == torch.float64
    assert not isinstance(ours, nn.SyncBatchNorm), "DistributedDataParallel would refuse it on the CPU"
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    assert bnext.SyncBatchNorm(3, bias=False).bias is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(copied: object) -> None:
    layer = bnext.SyncBatchNorm(3, activation="relu", unbiased_running_var=False)
    other = copied(layer)  # type: ignore[operator]
    assert type(other) is bnext.SyncBatchNorm and repr(other) == repr(layer)
    assert torch.equal(other(X), layer(X))


def test_not_in_place() -> None:
    with pytest.raises(ValueError, match="expected inplace=False: a synchronized layer keeps its input"):
        bnext.SyncBatchNorm(3, inplace=True)


def test_synchronize() -> None:
    """In place: the same objects, parameters and results, whoever made the layers."""
    net = network()
    before, parameters, expected = [*net], [*net.parameters()], copy.deepcopy(net)(X)
    seen: list[Tensor] = []
    net[1].register_forward_hook(lambda layer, given, y: seen.append(y))
    group = object()
    assert bnext.synchronize(net, group) is net  # type: ignore[arg-type]
    assert [type(layer) for layer in net] == [nn.Conv2d, *[bnext.SyncBatchNorm] * 3]
    assert all(one is other for one, other in zip(net, before, strict=True))
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    assert [layer.process_group for layer in net[1:]] == [group] * 3
    torch.testing.assert_close(net(X), expected)
    assert len(seen) == 1
    layer = nn.BatchNorm1d(3)
    assert bnext.synchronize(layer) is layer and type(layer) is bnext.SyncBatchNorm


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Unlike(3), "expected torch's or bnext's layers, but '1' is a Unlike"),
        (nn.LazyBatchNorm2d(), "but '1' is a LazyBatchNorm2d"),
        (bnext.BatchNorm2d(3, inplace=True), "expected inplace=False, but got True in '1'"),
    ],
)
def test_what_cannot_be_synchronized(layer: nn.Module, text: str) -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), layer)
    with pytest.raises(ValueError, match=text):
        bnext.synchronize(net)
    assert type(net[0]) is nn.BatchNorm2d


def test_convert_and_restore() -> None:
    net = nn.Sequential(nn.SyncBatchNorm(3), bnext.SyncBatchNorm(3, activation="relu"))
    net[0].process_group = group = object()
    bnext.convert(net)
    assert type(net[0]) is bnext.SyncBatchNorm and net[0].process_group is group
    bnext.restore(net)
    assert type(net[0]) is nn.SyncBatchNorm and net[0].process_group is group
    assert isinstance(net[1], NormActivation) and type(net[1].norm) is nn.SyncBatchNorm
    assert not hasattr(net[0], "activation")


def test_fuse_leaves_them_and_what_it_made_can_be_synchronized() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), bnext.SyncBatchNorm(3), nn.ReLU())
    fused = bnext.fuse(net, X)
    assert counts(fused) == {"norm+relu": 1, "norm": 1, "activation": 1}
    expected = copy.deepcopy(fused)(X)
    bnext.synchronize(fused)
    assert type(fused[0]) is bnext.SyncBatchNorm
    torch.testing.assert_close(fused(X), expected)
