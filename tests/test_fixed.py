"""Layers of fixed statistics, such as torchvision's FrozenBatchNorm2d: found by their forward, and fused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bnext
from bnext.networks.fixed import FixedBatchNorm
from fixed_norms import FIXED, UNLIKE_FIXED, Frozen, Itself, Switched, affine, by
from fusing import counts
from networks import CLOSE, Net, images, make, step

every_kind = pytest.mark.parametrize("kind", FIXED)


def of_a_kind(kind: str) -> Frozen:
    layer = make(lambda: nn.Sequential(FIXED[kind](3)))[0]
    layer.running_var.abs_().add_(0.1)
    return layer


def forward_of_a_block(net: Any, x: Tensor) -> Tensor:
    x = net.relu(net.bn1(net.conv1(x)))
    out = net.bn2(net.conv2(x))
    out += x
    return net.relu(out)


def network(kind: str) -> nn.Module:
    """A residual block of a detector's backbone."""
    net = make(
        lambda: Net(
            forward_of_a_block,
            conv1=nn.Conv2d(3, 3, 3, padding=1, bias=False),
            bn1=FIXED[kind](3),
            conv2=nn.Conv2d(3, 3, 3, padding=1, bias=False),
            bn2=FIXED[kind](3),
            relu=nn.ReLU(inplace=True),
        )
    )
    for layer in (net.bn1, net.bn2):
        layer.running_var.abs_().add_(0.1)
    return net


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@every_kind
def test_converted(kind: str, layout: torch.memory_format) -> None:
    plain = of_a_kind(kind)
    layer = copy.deepcopy(plain)
    assert bnext.convert(layer) is layer and type(layer) is type(plain)
    bnext.convert(layer, subclasses=True)
    assert isinstance(layer, FixedBatchNorm) and isinstance(layer, type(plain)) and repr(layer) == repr(plain)
    x = images().contiguous(memory_format=layout)
    for training in (True, False):
        plain.train(training)
        layer.train(training)
        found, expected = step(nn.Sequential(layer), x), step(nn.Sequential(plain), x)
        torch.testing.assert_close(found, expected, **CLOSE)
    assert layer(x).is_contiguous(memory_format=layout)
    plain.running_mean += 1
    layer.running_mean += 1
    torch.testing.assert_close(layer(x), plain(x), **CLOSE)


@every_kind
def test_fused(kind: str) -> None:
    plain = network(kind)
    fused = bnext.fuse(plain, images())
    assert counts(fused) == {"norm+relu": 1, "norm+add+relu": 1}
    assert type(plain.bn1) is type(FIXED[kind](3)) and isinstance(fused.bn1, FixedBatchNorm)
    assert list(fused.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)
    assert counts(bnext.fuse(fused, images())) == counts(fused)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fused), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(step(other, images()), step(plain, images()), **CLOSE)


def test_beside_batch_norms() -> None:
    plain = make(
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Frozen(3), nn.ReLU(), nn.BatchNorm2d(3), nn.SiLU())
    )
    assert counts(bnext.fuse(plain, images())) == {"norm+relu": 1, "norm+silu": 1}


def test_what_the_others_differ_from() -> None:
    assert isinstance(bnext.convert(by(affine)(), subclasses=True), FixedBatchNorm)


def test_a_list_picks_elements() -> None:
    """The numbers that as a shape would spread a vector over channels."""

    def picked(layer: Any, x: Tensor, *_: Tensor) -> Tensor:
        scale = layer.weight * (layer.running_var + layer.eps).rsqrt()
        shift = layer.bias - layer.running_mean * scale
        return x * scale[[1, -1, 1, 1]] + shift[[1, -1, 1, 1]]

    assert not isinstance(bnext.convert(by(picked)(), subclasses=True), FixedBatchNorm)


@pytest.mark.parametrize("name", UNLIKE_FIXED)
def test_what_stays_as_it_is(name: str) -> None:
    plain = make(
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), UNLIKE_FIXED[name](), nn.BatchNorm2d(3), nn.ReLU())
    )
    plain[1].running_var.abs_()
    before = copy.deepcopy(plain)
    fused = bnext.fuse(plain, images())
    bnext.convert(plain, subclasses=True)
    for found in (plain, fused):
        assert type(found[1]) is type(before[1])
        torch.testing.assert_close(
            step(copy.deepcopy(found), images()), step(copy.deepcopy(before), images()), **CLOSE
        )


CALLS: dict[str, tuple[torch.dtype, Tensor]] = {
    "other dtype": (torch.float32, torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)),
    "wider dtype": (torch.float32, torch.randn(2, 3, 4, 5, dtype=torch.float64)),
    "integers": (torch.float32, torch.arange(24).view(2, 3, 4, 1)),
    "three dimensions": (torch.float32, torch.randn(3, 4, 5)),
    "five dimensions": (torch.float32, torch.randn(2, 1, 3, 4, 5)),
    "one channel": (torch.float32, torch.randn(2, 1, 4, 5)),
    "16 bits": (torch.bfloat16, torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)),
    "no examples": (torch.float32, torch.randn(0, 3, 4, 5)),
    "another order": (torch.float32, torch.randn(2, 3, 4, 5).transpose(2, 3)),
    "gaps": (torch.float32, torch.randn(2, 3, 6, 7).to(memory_format=torch.channels_last)[..., 1:, 1:]),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_it_takes(name: str) -> None:
    """Whatever broadcasts and promotes does so still, also with a residual and an activation drawn in."""
    dtype, x = CALLS[name]
    plain = of_a_kind("frozen").to(dtype)
    layer = bnext.convert(copy.deepcopy(plain), subclasses=True)
    # The formula rounds to bfloat16 thrice, ours once.
    rounding = {"rtol": 2e-2, "atol": 2e-2} if torch.bfloat16 in (dtype, x.dtype) else {}
    expected = plain(x)
    torch.testing.assert_close(layer(x), expected, check_stride=True, **rounding)
    followed = torch.relu(expected + expected)
    drawn_in = layer(x, drawn_in=(expected, "relu", None))
    torch.testing.assert_close(drawn_in, followed, **rounding)


def test_gradients_where_they_are_asked_for() -> None:
    plain = of_a_kind("frozen")
    layer = bnext.convert(copy.deepcopy(plain), subclasses=True)
    for one in (plain, layer):
        one.running_mean.requires_grad_()
    for one in (plain, layer):
        one(images()).sum().backward()
    torch.testing.assert_close(layer.running_mean.grad, plain.running_mean.grad, **CLOSE)
    for name in ("weight", "running_mean", "running_var"):
        vector = getattr(plain, name).detach()
        given = [
            torch.func.jvp(
                lambda v, one=one, name=name: torch.func.functional_call(one, {name: v}, (images(),)),
                (vector,),
                (torch.ones_like(vector),),
            )
            for one in (layer, plain)
        ]
        torch.testing.assert_close(given[0], given[1], **CLOSE)


def test_without_channels_and_what_is_no_tensor() -> None:
    plain = of_a_kind("frozen")
    layer = bnext.convert(copy.deepcopy(plain), subclasses=True)
    torch.testing.assert_close(layer(2.0), plain(2.0), rtol=0, atol=0)
    none = bnext.convert(Frozen(0), subclasses=True)
    assert none(torch.randn(2, 0, 4, 4)).shape == (2, 0, 4, 4)


def test_attributes_are_its_own() -> None:
    layer = bnext.convert(Switched(3).eval(), subclasses=True)
    assert isinstance(layer, FixedBatchNorm) and not hasattr(layer, "activation")
    layer.activation = "relu"  # means nothing to it
    assert layer(-torch.ones(1, 3, 1, 1)).max() < 0
    assert bnext.restore(layer).frozen and layer.activation == "relu" and not layer.train().training


def test_a_copy_that_is_itself_stays_in_its_mode() -> None:
    network = nn.Sequential(Itself(3)).eval()
    assert type(bnext.convert(network, subclasses=True)[0]) is Itself and not network[0].training


def test_state_dicts_and_the_way_back() -> None:
    plain = network("frozen")
    converted = bnext.convert(copy.deepcopy(plain), subclasses=True)
    keys = vars(plain.bn1).keys()
    state = {**plain.state_dict(), "bn1.num_batches_tracked": torch.tensor(3)}
    assert not any(converted.load_state_dict(state))
    with pytest.raises(ValueError, match="has none"):
        bnext.freeze(copy.deepcopy(converted))
    assert bnext.synchronize(converted) is converted and isinstance(converted.bn1, FixedBatchNorm)
    assert bnext.restore(converted) is converted and type(converted.bn1) is Frozen
    assert vars(converted.bn1).keys() == keys
    torch.testing.assert_close(step(converted, images()), step(plain, images()), rtol=0, atol=0)


def test_hooks_see_the_layer_by_itself() -> None:
    plain = network("frozen")
    fused = bnext.fuse(plain, images())
    seen: list[Tensor] = []
    fused.bn2.register_forward_hook(lambda layer, args, y: seen.append(y.detach().clone()))
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **CLOSE)
    x = torch.relu(plain.bn1(plain.conv1(images())))
    torch.testing.assert_close(seen[0], plain.bn2(plain.conv2(x)).detach(), **CLOSE)


@pytest.mark.usefixtures("fresh_compiler")
def test_traced_and_compiled() -> None:
    converted = bnext.convert(network("frozen"), subclasses=True)
    expected = converted(images())
    torch.testing.assert_close(fx.symbolic_trace(converted)(images()), expected, **CLOSE)
    alone = fx.symbolic_trace(converted.bn1)
    torch.testing.assert_close(alone(images()), converted.bn1(images()), **CLOSE)
    compiled = torch.compile(bnext.fuse(network("frozen"), images()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected, **CLOSE)


def test_more_exact_than_the_formula() -> None:
    plain = bnext.convert(Frozen(3), subclasses=True)
    plain.running_mean.fill_(1e5)
    plain.running_var.fill_(3)
    x = 1e5 + torch.randn(2, 3, 8, 8)
    exact = (x.double() - 1e5) / (3 + 1e-5) ** 0.5
    theirs = Frozen.forward(plain, x) - exact
    assert (plain(x) - exact).abs().max() <= 1e-6 < 1e-3 < theirs.abs().max()
