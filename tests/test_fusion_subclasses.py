"""bnext.fuse: batch norms of classes of somebody's own, with an activation in them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import bnext
from bnext.modules import FusedBatchNorm
from cases import ACTIVE, Active
from fusing import counts
from networks import CLOSE, Net, images, make, step


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: torch's function again, then children."""

    def __init__(self, channels: int, act: nn.Module | None = None, **keywords: Any) -> None:
        super().__init__(channels, **keywords)
        self.drop = nn.Identity()
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        uses_batch = self.training or self.running_mean is None
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            uses_batch,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class Of(nn.BatchNorm2d):
    """`after(norm(x))`."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__(3)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(x))


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
        before.train(training), fused.train(training)
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
    known = kind == "child" or active.activation_param is None  # a parameter is read off a child alone
    layer = NormAct(3, active.module()) if kind == "child" else Of(active.of)
    plain = make(lambda: nn.Sequential(layer))
    fused = bnext.fuse(plain, images())
    assert isinstance(fused[0], FusedBatchNorm) is known
    if known:
        assert fused[0].activation == active.activation
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


OPTIONS: list[dict[str, Any]] = [
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": 0.3, "eps": 1e-2},
    {"bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any]) -> None:
    plain = make(lambda: nn.Sequential(NormAct(3, nn.Hardswish(), **options)))
    fused = bnext.fuse(plain, images())
    assert isinstance(fused[0], FusedBatchNorm) and fused[0].activation == "hardswish"
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)


def doubled(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, y: 2 * y)
    return module


class Halves(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return torch.cat([super(Halves, self).forward(half) for half in x.chunk(2)])


class AlwaysEval(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class Counting(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(3)
        self.sizes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape)
        return super().forward(x)


class Lenient(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Scaled(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(3)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class Masked(nn.BatchNorm2d):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if mask is None else y * mask


class Weightless(nn.BatchNorm2d):
    """What does not show as long as the weight is 0, which is how last layers of blocks begin."""

    def __init__(self) -> None:
        super().__init__(3)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardtanh(super().forward(x))


STAY: dict[str, Callable[[], nn.Module]] = {
    "a parameter of its own": lambda: NormAct(3, nn.PReLU()),
    "a bound far away": lambda: Of(lambda z: z.clamp(-1e5, 1e5)),
    "a curve that is close": lambda: Of(lambda z: F.gelu(z, approximate="tanh")),
    "a weight of 0": Weightless,
    "a parametrized weight": lambda: parametrize.register_parametrization(
        Lenient(3), "weight", nn.Identity()
    ),
    "a hook on its activation": lambda: NormAct(3, doubled(nn.ReLU())),
    "random numbers": lambda: NormAct(3, nn.Dropout(0.01)),
    "statistics of halves": lambda: Halves(3),
    "statistics of eval": lambda: AlwaysEval(3),
    "lists that grow": Counting,
    "an attribute that is ours": Scaled,
    "another argument": lambda: Masked(3),
}


@pytest.mark.parametrize("name", STAY)
def test_what_stays_as_it_is(name: str) -> None:
    plain = make(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), STAY[name](), nn.BatchNorm2d(3), nn.ReLU()))
    fused = bnext.fuse(plain, images())
    assert type(fused[1]) is type(plain[1]) and isinstance(fused[2], FusedBatchNorm)
    torch.manual_seed(0)
    expected = step(plain, images())
    torch.manual_seed(0)
    torch.testing.assert_close(step(fused, images()), expected, **CLOSE)


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
        plain.train(training), before.train(training)
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
    torch.testing.assert_close(program.module()(images()), fused(images()), rtol=0, atol=0)


def test_what_else_takes_them() -> None:
    fused = bnext.fuse(make(network), images())
    again = bnext.fuse(fused, images())
    assert counts(again) == counts(fused)
    frozen = bnext.freeze(copy.deepcopy(fused)).train()
    assert not frozen.bn1.training
    with pytest.raises(ValueError, match=r"bnext\.fuse has not made"):
        bnext.restore(fused)
    synchronized = bnext.synchronize(copy.deepcopy(fused))
    assert all(
        isinstance(layer, bnext.SyncBatchNorm)
        for layer in synchronized.modules()
        if isinstance(layer, FusedBatchNorm)
    )
    torch.testing.assert_close(step(synchronized, images()), step(fused, images()), **CLOSE)
