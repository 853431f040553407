"""bnext.fuse: batch norms of classes of somebody's own, with an activation in them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bnext
from bnext.modules import FusedBatchNorm
from cases import ACTIVE, Active
from fusing import counts
from layers import TORCH_TAKES_BIAS
from networks import CLOSE, Net, images, make, step
from own_norms import UNLIKE_OURS, Lenient, NormAct, Of, Rebuilt


def forward_of_a_block(net: Any, x: Tensor) -> Tensor:
    x = net.bn1(net.conv1(x))
    return net.act(net.bn3(net.conv3(net.bn2(net.conv2(x)))) + x)


def network() -> nn.Module:
    """A residual block as timm's RegNets have it."""
    return Net(
        forward_of_a_block,
        conv1=nn.Conv2d(3, 4, 3, bias=False),
        bn1=NormAct(4, nn.ReLU(inplace=True)),
        conv2=nn.Conv2d(4, 6, 1, bias=False),
        bn2=NormAct(6, nn.SiLU()),
        conv3=nn.Conv2d(6, 4, 1, bias=False),
        bn3=NormAct(4),
        act=nn.ReLU(),
    )


def test_a_network_of_them() -> None:
    plain = make(network)
    keys, before = list(plain.state_dict()), copy.deepcopy(plain)
    fused = bnext.fuse(plain, images())
    assert counts(fused) == {"norm+relu": 1, "norm+silu": 1, "norm+add+relu": 1}
    for name in ("bn1", "bn2", "bn3"):
        layer = getattr(fused, name)
        assert isinstance(layer, NormAct) and isinstance(layer, FusedBatchNorm)
        assert type(getattr(plain, name)) is NormAct
    assert list(fused.state_dict()) == keys
    for training in (True, True, False, True):
        before.train(training)
        fused.train(training)
        torch.testing.assert_close(step(fused, images()), step(before, images()), **CLOSE)
    torch.testing.assert_close(dict(fused.state_dict()), dict(before.state_dict()), **CLOSE)


def test_copies_and_pickles() -> None:
    fused = bnext.fuse(make(network), images())
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fused), torch.load(buffer, weights_only=False)):
        assert type(other.bn1) is type(fused.bn1)
        assert repr(other) == repr(fused) and "activation=silu" in repr(other)
        torch.testing.assert_close(
            step(other, images()), step(copy.deepcopy(fused), images()), rtol=0, atol=0
        )


@pytest.mark.parametrize("kind", ["child", "function"])
@pytest.mark.parametrize("active", ACTIVE, ids=str)
def test_every_activation(active: Active, kind: str) -> None:
    layer = NormAct(3, active.module()) if kind == "child" else Of(active.function())
    plain = make(lambda: nn.Sequential(layer))
    fused = bnext.fuse(plain, images())
    assert isinstance(fused[0], FusedBatchNorm) and fused[0].activation == active.activation
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


OPTIONS: list[dict[str, Any]] = [
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": 0.3, "eps": 1e-2},
    *([{"bias": False}] if TORCH_TAKES_BIAS else []),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any]) -> None:
    plain = make(lambda: nn.Sequential(NormAct(3, nn.Hardswish(), **options)))
    fused = bnext.fuse(plain, images())
    assert isinstance(fused[0], FusedBatchNorm) and fused[0].activation == "hardswish"
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


@pytest.mark.parametrize("name", UNLIKE_OURS)
def test_what_stays_as_it_is(name: str) -> None:
    plain = make(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), UNLIKE_OURS[name](), nn.BatchNorm2d(3), nn.ReLU()))
    own, before = type(plain[1]), copy.deepcopy(plain)
    assert type(bnext.convert(plain, subclasses=True)[1]) is own and isinstance(plain[2], FusedBatchNorm)
    torch.testing.assert_close(plain.state_dict(), before.state_dict(), rtol=0, atol=0)
    torch.manual_seed(0)
    expected = step(before, images())
    torch.manual_seed(0)
    torch.testing.assert_close(step(plain, images()), expected, **CLOSE)


@pytest.mark.parametrize("name", UNLIKE_OURS)
def test_what_fuse_leaves_as_it_is(name: str) -> None:
    plain = make(lambda: nn.Sequential(UNLIKE_OURS[name](), nn.BatchNorm2d(3), nn.ReLU()))
    fused = bnext.fuse(plain, images())
    assert type(fused[0]) is type(plain[0])
    torch.manual_seed(0)
    expected = step(plain, images())
    torch.manual_seed(0)
    torch.testing.assert_close(step(fused, images()), expected, **CLOSE)


class Holding(nn.BatchNorm2d):
    """What a copy would call is this one's."""

    def __init__(self) -> None:
        super().__init__(3)
        self.run = lambda x: nn.BatchNorm2d.forward(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_copied_in_a_way_of_its_own() -> None:
    layer = bnext.convert(Rebuilt(3), subclasses=True)
    assert type(layer) is Rebuilt and type(copy.deepcopy(layer)(torch.randn(2, 3, 4, 5))) is Tensor


def test_a_function_around_it_is_not_called() -> None:
    layer = Holding()
    before = copy.deepcopy(layer.state_dict())
    assert type(bnext.convert(layer, subclasses=True)) is Holding
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_classes_that_note_their_subclasses() -> None:
    class Noting(nn.BatchNorm2d):
        known: list[type] = []  # noqa: RUF012

        def __init_subclass__(cls) -> None:
            Noting.known.append(cls)

    assert bnext.convert(Noting(3), subclasses=True).activation is None and not Noting.known


def test_more_dimensions_than_ours_take() -> None:
    plain = make(
        lambda: Net(
            lambda net, x: net.other(net.norm(x[..., None])[..., 0]), norm=Lenient(3), other=NormAct(3)
        )
    )
    fused = bnext.fuse(plain, images())
    assert type(fused.norm) is Lenient
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


def test_a_forward_called_by_a_name_of_its_own() -> None:
    plain = make(
        lambda: Net(lambda net, x: net.other(net.norm(x=x)), norm=NormAct(3), other=nn.BatchNorm2d(3))
    )
    fused = bnext.fuse(plain, images())
    assert type(fused.norm) is NormAct and isinstance(fused.other, FusedBatchNorm)
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


def test_converted_and_restored() -> None:
    plain = make(network)
    before, keys = copy.deepcopy(plain), list(plain.state_dict())
    seen: list[torch.Size] = []
    plain.bn1.register_forward_hook(lambda layer, args, y: seen.append(y.shape))
    assert type(bnext.convert(plain).bn1) is NormAct
    layers = [plain.bn1, plain.bn2, plain.bn3]
    bnext.convert(plain, subclasses=True)
    assert [layer.activation for layer in layers] == ["relu", "silu", None]
    assert all(isinstance(layer, FusedBatchNorm) and isinstance(layer, NormAct) for layer in layers)
    for training in (True, False):
        plain.train(training)
        before.train(training)
        torch.testing.assert_close(step(plain, images()), step(before, images()), **CLOSE)
    assert len(seen) == 2
    assert bnext.restore(plain) is plain and [plain.bn1, plain.bn2, plain.bn3] == layers
    assert [type(layer) for layer in layers] == [NormAct] * 3
    assert list(plain.state_dict()) == keys
    assert vars(plain.bn3).keys() == vars(before.bn3).keys()
    torch.testing.assert_close(step(plain, images()), step(before, images()), **CLOSE)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_exported() -> None:
    fused = bnext.fuse(make(network), images())
    expected = step(copy.deepcopy(fused), images())
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, images()).items()}
    torch.testing.assert_close(found, expected, **CLOSE)
    fused.eval()
    program = torch.export.export(fused, (images(),))
    torch.testing.assert_close(program.module()(images()), fused(images()), **CLOSE)


def test_what_else_takes_them() -> None:
    fused = bnext.fuse(make(network), images())
    again = bnext.fuse(fused, images())
    assert counts(again) == counts(fused)
    frozen = bnext.freeze(copy.deepcopy(fused)).train()
    assert not frozen.bn1.training
    with pytest.raises(ValueError, match=r"bnext\.fuse has not made"):
        bnext.restore(fused)


def test_synchronized_they_are_still_of_their_class() -> None:
    plain = make(lambda: nn.Sequential(NormAct(3, nn.ReLU()), Lenient(3)))
    found = bnext.synchronize(bnext.convert(copy.deepcopy(plain), subclasses=True))
    assert all(isinstance(layer, bnext.SyncBatchNorm) for layer in found)
    assert isinstance(found[0], NormAct) and isinstance(found[1], Lenient)
    torch.testing.assert_close(step(found, images()), step(plain, images()), **CLOSE)
    with pytest.raises(ValueError, match="expected a class to go back to, but '0'"):
        bnext.restore(found)


def test_parametrized_afterwards() -> None:
    network = bnext.convert(make(lambda: nn.Sequential(NormAct(3, nn.ReLU()))), subclasses=True)
    parametrize.register_parametrization(network[0], "weight", nn.Softplus())
    expected = network.eval()(images())
    for change in (bnext.restore, bnext.synchronize):
        with pytest.raises(ValueError, match="but '0' is a ParametrizedNormAct"):
            change(network)
        assert torch.equal(network(images()), expected)
