"""Frozen layers: in eval for good, torch's gradients of that, and nothing kept that backward does not need."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import bnext
from benchmarks.blocks import kept_bytes
from benchmarks.resnet import resnet
from cases import ACTIVE, LAYOUT, Active, arguments_of

SHAPE = (4, 6, 5, 3)


def network(layer: type[nn.Module] = bnext.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 6, 1), layer(6), nn.ReLU(), nn.Conv2d(6, 6, 1), layer(6))
    for module in made:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return made


def test_stays_in_eval(device: str) -> None:
    """Whatever is called: outputs and gradients are those of torch's layers in eval, statistics stay."""
    ours, torchs = bnext.freeze(network().to(device)), network(nn.BatchNorm2d).to(device).eval()
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    x = torch.randn(2, 3, 4, 5, device=device)
    for mode in (True, False, True):
        assert ours.train(mode) is ours and ours.training == mode
        assert [m.training for m in ours] == [mode, False, mode, mode, False]
        results = [model(x) for model in (ours, torchs)]
        torch.testing.assert_close(*results)
        grads = [
            torch.autograd.grad(y.sin().sum(), (m[0].weight, m[3].bias))
            for y, m in zip(results, (ours, torchs), strict=True)
        ]
        torch.testing.assert_close(*grads)
    for name, t in ours.state_dict().items():
        assert torch.equal(t, before[name])
    assert [p.requires_grad for p in ours[1].parameters()] == [False, False]


def test_and_back() -> None:
    model = bnext.freeze(network())
    assert "frozen=True" in repr(model[1])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.train()
        assert not other[1].training and other[1].frozen
    assert bnext.unfreeze(model) is model and "frozen" not in repr(model[1])
    assert not model[1].training and all(p.requires_grad for p in model.parameters())
    assert model.train()[1].training
    counter = model[1].num_batches_tracked.clone()
    model(torch.randn(2, 3, 4, 5))
    assert model[1].num_batches_tracked == counter + 1
    bnext.freeze(model, affine=False)
    assert not model[1].training and all(p.requires_grad for p in model.parameters())


def test_a_reset_to_fill_statistics_again_passes_by() -> None:
    """torch.optim.swa_utils.update_bn resets every batch norm, and those that stay in eval would not be filled."""
    model = bnext.freeze(network())
    bnext.unfreeze(model[4])
    kept, filled = copy.deepcopy(model[1].state_dict()), copy.deepcopy(model[4].state_dict())
    torch.optim.swa_utils.update_bn([torch.randn(8, 3, 4, 5)], model)
    assert all(torch.equal(t, kept[name]) for name, t in model[1].state_dict().items())
    assert not torch.equal(model[4].running_mean, filled["running_mean"])
    assert model[4].num_batches_tracked == 1
    model[1].reset_parameters()
    assert not model[1].running_mean.any() and model[1].weight.eq(1).all() and model[1].frozen


def test_restore_leaves_eval() -> None:
    model = bnext.restore(bnext.freeze(network()).train())
    assert type(model[1]) is nn.BatchNorm2d and not model[1].training and not hasattr(model[1], "frozen")


@pytest.mark.parametrize("fused", [False, True])
def test_in_networks(fused: bool) -> None:
    """One layer, a synchronized one, and what fuse makes of a frozen network."""
    layer = bnext.freeze(bnext.BatchNorm2d(3))
    assert not layer.train().training
    assert not bnext.synchronize(bnext.freeze(network())).train()[4].training
    x = torch.randn(2, 3, 4, 5)
    model = bnext.freeze(network()).train()
    other = bnext.fuse(model, x) if fused else torch.compile(model, fullgraph=True, backend="aot_eager")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.testing.assert_close(other(x), model(x))
    other.train()
    torch.testing.assert_close(other(x), model(x))
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


class Own(nn.BatchNorm2d):
    """Somebody's, which may do anything."""


def test_refusals() -> None:
    mixed = nn.Sequential(bnext.BatchNorm2d(3), nn.BatchNorm2d(3))
    untracked = nn.Sequential(bnext.BatchNorm2d(3), bnext.BatchNorm2d(3, track_running_stats=False))
    cases: list[tuple[Callable[..., object], nn.Module, str]] = [
        (
            bnext.freeze,
            mixed,
            r"'1' is a torch.nn.modules.batchnorm.BatchNorm2d \(bnext.convert makes them of it",
        ),
        (
            bnext.freeze,
            nn.Sequential(Own(3)),
            r"'0' is a .*\.Own \(bnext.convert looks at it with subclasses=True",
        ),
        (bnext.unfreeze, mixed, "'1' is a torch.nn.modules.batchnorm.BatchNorm2d"),
        (bnext.freeze, untracked, "with running statistics, but '1' has none"),
        (bnext.freeze, nn.ReLU(), "ReLU has none"),
    ]
    for function, module, text in cases:
        with pytest.raises(ValueError, match=text):
            function(module)
        assert all(m.training for m in module.modules())
        assert not any(getattr(m, "frozen", False) for m in module.modules())


def test_a_frozen_network_keeps_half() -> None:
    """Of what torch's keeps for backward with its batch norms in eval and without gradients; bits, with ReLU in it."""
    plain = resnet("resnet50").requires_grad_(False)
    x = torch.randn(2, 3, 128, 128, requires_grad=True)
    kept = []
    frozen = bnext.freeze(bnext.convert(copy.deepcopy(plain)))
    for model in (plain.eval(), frozen, bnext.fuse(frozen, x[..., :64, :64].detach())):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.requires_grad_()
        kept.append(kept_bytes(lambda m=model: m(x), [x, *model.parameters(), *model.buffers()]))
    assert kept[1] <= 0.5 * kept[0] and kept[2] <= 1.02 * kept[1]


# What backward needs of x in eval, by form and by what requires grad: an activation's slope and dweight do.
def needs_x(active: Active | None, weight: bool) -> bool:
    return weight or (active is not None and active.activation not in ("relu", "leaky_relu", "relu6"))


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "hwnc"])
@pytest.mark.parametrize("weight", [False, True], ids=["frozen", "weight"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("active", [None, *ACTIVE], ids=str)
def test_keeps_nothing_needless(
    active: Active | None, residual: bool, weight: bool, layout: str, device: str
) -> None:
    """And the gradients are those of a backward that has x, to second order, wherever dy lies."""
    given = arguments_of(active)
    layer = bnext.BatchNorm2d(6, activation=given[0], activation_param=given[1]).to(device, torch.float64)
    layer.running_mean.normal_()
    nn.init.normal_(layer.weight)
    bnext.freeze(layer).train()
    layer.bias.requires_grad_()
    layer.weight.requires_grad_(weight)
    source = LAYOUT[layout].arrange(torch.randn(SHAPE, device=device, dtype=torch.float64))
    added = torch.randn(SHAPE, device=device, dtype=torch.float64).requires_grad_()
    leaves = [source.requires_grad_(), layer.bias, *[added] * residual]

    def forward() -> Tensor:
        y: Tensor = layer(source * 1, *[added] * residual)
        return y

    x_bytes = source.numel() * 8
    kept = kept_bytes(forward, (source, added, layer.bias, layer.weight))
    more = 4 * 6 * 8 + source.numel() // 8 + 16  # stats, and a mask
    assert kept <= x_bytes * needs_x(active, weight) + more
    assert kept >= x_bytes * needs_x(active, weight)

    grads = []
    for whole in (False, True):
        layer.weight.requires_grad_(whole or weight)
        y = forward()
        dy = (
            torch.linspace(-1, 1, y.numel(), device=device, dtype=torch.float64)
            .view(SHAPE[::-1])
            .permute(3, 2, 1, 0)
        )
        dy.requires_grad_()
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), dy)
        grads.append((*first, *second))
    for index, (one, other) in enumerate(zip(*grads, strict=True)):
        assert torch.equal(one, other)
        in_order_of_dy = index == len(leaves) and active is not None  # found by operations of torch's
        assert in_order_of_dy or one.stride() == other.stride()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("active", [None, Active("relu")], ids=str)
def test_batched_gradients(active: Active | None, layout: str, device: str) -> None:
    """As torch.autograd.functional's vectorized Jacobians ask for."""
    layer = bnext.BatchNorm2d(6, activation=active and active.activation).to(device, torch.float64)
    bnext.freeze(layer)
    made = torch.randn(2, 6, 2, 1, device=device, dtype=torch.float64)
    x = LAYOUT[layout].arrange(made).requires_grad_()
    residual = torch.randn_like(made).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, residual), check_batched_grad=True)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_examples_of_torch_vmap(layout: str, device: str) -> None:
    """All at once, and the operator with a mask of each."""
    layer = bnext.freeze(bnext.BatchNorm2d(6, activation="relu")).to(device, torch.float64)
    layer.running_mean.normal_()
    x = torch.stack([LAYOUT[layout].arrange(torch.randn(SHAPE, dtype=torch.float64)) for _ in range(3)])
    x = x.to(device).requires_grad_()
    dy = torch.randn_like(x)
    at_once, one_by_one = torch.vmap(layer)(x), torch.stack([layer(one) for one in x])
    torch.testing.assert_close(at_once, one_by_one)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy) for y in (at_once, one_by_one)))

    def operator(x: Tensor) -> tuple[Tensor, ...]:
        state = (None, layer.weight, layer.bias, layer.running_mean, layer.running_var, None)
        options = (False, 0.1, 1e-5, True, [], "relu", None, True, False, False)  # keeps_input comes last
        results: tuple[Tensor, ...] = torch.ops.bnext.batch_norm.default(x, *state, *options)
        return results

    with torch.no_grad():
        expected = [torch.stack(outputs) for outputs in zip(*map(operator, x), strict=True)]
        assert expected[2].shape == (3, x[0].numel() // 32 * 4 + 8)
        torch.testing.assert_close([*torch.vmap(operator)(x)], expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("active", [None, *ACTIVE], ids=str)
def test_transformed_gradients_that_lie_otherwise(active: Active | None, layout: str, device: str) -> None:
    """Batched, and with a tangent: they do not say how they lie, and a mask's bits lie as x does."""
    layer = bnext.BatchNorm2d(
        6, activation=active and active.activation, activation_param=active and active.activation_param
    ).to(device, torch.float64)
    bnext.freeze(layer)
    torch.manual_seed(0)
    x, residual, dy = (
        LAYOUT[name].arrange(torch.randn(SHAPE, device=device, dtype=torch.float64))
        for name in (layout, layout, "nhwc" if layout == "nchw" else "nchw")
    )
    leaves = (x.requires_grad_(), residual.requires_grad_())
    y = layer(*leaves)
    expected = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    batched = torch.autograd.grad(y, leaves, torch.stack([dy, -dy]), is_grads_batched=True, retain_graph=True)
    with forward_ad.dual_level():
        dual = torch.autograd.grad(y, leaves, forward_ad.make_dual(dy, 2 * dy))
        primals, tangents = zip(*(forward_ad.unpack_dual(g) for g in dual), strict=True)
    for one, many, primal, tangent in zip(expected, batched, primals, tangents, strict=True):
        for found, factor in ((many[0], 1), (many[1], -1), (primal, 1), (tangent, 2)):
            torch.testing.assert_close(found, factor * one)


def test_second_derivatives_of_what_is_not_finite(device: str) -> None:
    """The gradient of dy is w * invstd, whatever dy and x hold."""
    for affine in (True, False):
        layer = bnext.freeze(bnext.BatchNorm2d(6), affine).to(device)
        x = torch.full(SHAPE, float("inf"), device=device, requires_grad=True)
        dy = torch.full(SHAPE, float("inf"), device=device, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
        (found,) = torch.autograd.grad(dx.sum(), dy)
        torch.testing.assert_close(found, torch.full_like(found, (1 + 1e-5) ** -0.5))


def test_parametrized_weights_are_frozen_too() -> None:
    layer = nn.utils.parametrize.register_parametrization(bnext.BatchNorm1d(3), "weight", nn.Identity())
    assert not any(p.requires_grad for p in bnext.freeze(layer).parameters())


def test_train_takes_what_torchs_takes() -> None:
    for layer in (bnext.BatchNorm1d(3), bnext.freeze(bnext.BatchNorm1d(3))):
        with pytest.raises(ValueError, match="training mode is expected to be boolean"):
            layer.train("yes")


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "relu6"])
def test_x_may_change_where_it_is_not_kept(activation: str | None, device: str) -> None:
    """As after torch's additions; where it is kept the change is an error."""
    for affine in (True, False):
        layer = bnext.freeze(bnext.BatchNorm2d(6, activation=activation), affine).to(device)
        x = torch.rand(SHAPE, device=device, requires_grad=True)  # up to 1: no activation does anything
        h = x * 1
        y = layer(h)
        h.sub_(2)
        if affine:
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            torch.testing.assert_close(dx, torch.full_like(dx, (1 + 1e-5) ** -0.5))
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
