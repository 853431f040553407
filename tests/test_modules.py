"""Drop-in: what works with torch.nn.BatchNorm1d, 2d and 3d works with ours, and gives the same."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bnext
from layers import (
    CLOSE_OF_A_LAYER,
    PAIRS,
    TORCH_TAKES_BIAS,
    Pair,
    every_copy,
    every_option,
    every_pair,
    inputs,
    layer_step,
)


def twins(
    pair: Pair, device: str = "cpu", dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's in the same random state."""
    torch.manual_seed(11)
    theirs = pair[1](5, device=device, dtype=dtype, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = pair[0](5, device=device, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@every_option
@every_pair
def test_same_training_and_eval(pair: Pair, options: dict[str, Any], device: str) -> None:
    ours, theirs = twins(pair, device, **options)
    for mode in (True, True, True, False, True, False):
        ours.train(mode)
        theirs.train(mode)
        for x in inputs(pair, device):
            torch.testing.assert_close(layer_step(ours, x), layer_step(theirs, x), **CLOSE_OF_A_LAYER)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **CLOSE_OF_A_LAYER)


@pytest.mark.parametrize("train_flags", list(itertools.product([True, False], repeat=3)), ids=str)
def test_same_when_tracking_is_flipped(train_flags: tuple[bool, ...], device: str) -> None:
    """`track_running_stats` is a plain attribute; programs set it. What then happens is what torch does."""
    ours, theirs = twins(PAIRS["2d"], device)
    for track, x in zip(train_flags, inputs(PAIRS["2d"], device), strict=True):
        for layer in (ours, theirs):
            layer.track_running_stats = track
        for training in (True, False):
            ours.train(training)
            theirs.train(training)
            torch.testing.assert_close(layer_step(ours, x), layer_step(theirs, x), **CLOSE_OF_A_LAYER)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **CLOSE_OF_A_LAYER)


def test_same_when_buffers_are_removed(device: str) -> None:
    """Both buffers set to None: eval normalises with the batch."""
    ours, theirs = twins(PAIRS["2d"], device)
    for layer in (ours, theirs):
        layer.running_mean = layer.running_var = None
        layer.eval()
    (x,) = inputs(PAIRS["2d"], device, count=1)
    torch.testing.assert_close(layer_step(ours, x), layer_step(theirs, x), **CLOSE_OF_A_LAYER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["16-bit parameters", "float32 parameters"])
def test_dtypes_are_torchs(dtype: torch.dtype, own: bool, device: str) -> None:
    """Of the output, every gradient and every buffer; the values are test_forward's business."""
    ours, theirs = twins(PAIRS["2d"], device, dtype if own else torch.float32)
    for x in inputs(PAIRS["2d"], device, dtype, count=1):
        for mine, other in zip(layer_step(ours, x), layer_step(theirs, x), strict=True):
            assert mine is not None and other is not None
            assert (mine.dtype, mine.shape, mine.device) == (other.dtype, other.shape, other.device)
    for (name, mine), (_, other) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert mine.dtype == other.dtype, name


@every_pair
def test_construction(pair: Pair) -> None:
    """torch's signature, positions included, and one keyword more."""
    options = {"bias": False} if TORCH_TAKES_BIAS else {}
    mine = pair[0](5, 1e-3, 0.2, True, True, "cpu", torch.float64, **options)
    other = pair[1](5, 1e-3, 0.2, True, True, "cpu", torch.float64, **options)
    assert repr(mine) == repr(other)
    assert mine._version == other._version
    assert {k: (v.dtype, v.shape) for k, v in mine.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in other.state_dict().items()
    }
    assert mine.unbiased_running_var
    with pytest.raises(TypeError, match="positional"):
        pair[0](5, 1e-3, 0.2, True, True, None, None, False)


@every_option
@every_pair
def test_repr(pair: Pair, options: dict[str, Any]) -> None:
    assert repr(pair[0](5, **options)) == repr(pair[1](5, **options))
    biased = repr(pair[0](5, unbiased_running_var=False, **options))
    assert biased == repr(pair[1](5, **options))[:-1] + ", unbiased_running_var=False)"


@every_pair
def test_type_checks_of_the_ecosystem(pair: Pair) -> None:
    layer = pair[0](5)
    assert isinstance(layer, pair[1])
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert type(layer).__name__ == pair[1].__name__


@every_option
@every_pair
def test_state_dicts_both_ways(pair: Pair, options: dict[str, Any]) -> None:
    ours, theirs = twins(pair, **options)
    for x in inputs(pair):
        ours(x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    fresh = pair[0](5, dtype=torch.float64, **options)
    fresh.load_state_dict(theirs.state_dict())
    for layer in (theirs, fresh):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, ours.state_dict()[name]), name


@every_pair
def test_state_dict_of_version_1(pair: Pair) -> None:
    """Before version 2 there was no num_batches_tracked; the counter then stays what it is."""
    layer = pair[0](5)
    layer.num_batches_tracked.fill_(4)
    state = pair[1](5).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer.load_state_dict(state)
    assert layer.num_batches_tracked.item() == 4
    state._metadata[""]["version"] = 2
    with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"):
        layer.load_state_dict(state)


@every_copy
@every_pair
def test_copies(pair: Pair, copied: Callable[[nn.Module], nn.Module]) -> None:
    ours, _ = twins(pair)
    ours.unbiased_running_var = False
    ours.momentum = 0.25
    ours.eval()
    other = copied(ours)
    assert type(other) is type(ours)
    assert repr(other) == repr(ours)
    (x,) = inputs(pair, count=1)
    assert torch.equal(other(x), ours(x))


@every_pair
def test_takes_over_the_state_of_torchs_class(pair: Pair) -> None:
    """As a pickle of torch's class does when it is read as ours: the keyword of ours then has its default."""
    theirs = pair[1](5, dtype=torch.float64)
    layer = pair[0].__new__(pair[0])
    layer.__setstate__(copy.deepcopy(theirs.__dict__))
    assert layer.unbiased_running_var
    (x,) = inputs(pair, count=1)
    torch.testing.assert_close(layer(x), theirs(x), **CLOSE_OF_A_LAYER)


@every_pair
def test_to(pair: Pair) -> None:
    layer = pair[0](5)
    layer.to(torch.float64)
    assert {t.dtype for t in layer.state_dict().values()} == {torch.float64, torch.int64}
    layer.half()
    assert layer.weight.dtype == layer.running_var.dtype == torch.float16
    layer.float().to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer(torch.empty(pair[2], device="meta")).shape == pair[2]
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.running_var, torch.ones(5))
    assert torch.equal(layer.running_mean, torch.zeros(5))
    assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """Autocast leaves batch normalization alone: 16-bit activations meet float32 parameters."""
    outputs = []
    for cls in (bnext.BatchNorm2d, nn.BatchNorm2d):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 5, 3), cls(5), nn.ReLU(), nn.Conv2d(5, 2, 1)).to(device)
        x = torch.randn(4, 3, 9, 9).to(device)
        with torch.autocast(device, dtype=dtype):
            y = model(x)
        y.float().square().sum().backward()
        outputs.append((y.float(), model[1].running_mean, model[1].running_var, model[1].weight.grad))
        assert y.dtype == dtype
        assert model[1].weight.grad.dtype == torch.float32
    # Both round activations to 16 bits, torch at other places than we do.
    torch.testing.assert_close(*outputs, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_trains_like_torchs() -> None:
    """Twenty steps of a small network, layer for layer, in float64."""
    losses = []
    for one_d, two_d in ((bnext.BatchNorm1d, bnext.BatchNorm2d), (nn.BatchNorm1d, nn.BatchNorm2d)):
        torch.manual_seed(2)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3), two_d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), one_d(8), nn.Linear(8, 1)
        ).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x, target = torch.randn(16, 1, 6, 6).double(), torch.randn(16, 1).double()
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    # Twenty steps of training amplify the last bits by two orders of magnitude or so.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)


def test_checkpointing_updates_twice_as_torch_does(device: str) -> None:
    """torch.utils.checkpoint runs the forward again in backward; gradients are those of the plain run."""
    ours, theirs = twins(PAIRS["2d"], device)
    for layer in (ours, theirs):
        (x,) = inputs(PAIRS["2d"], device, count=1)
        x.requires_grad_()
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        y.square().sum().backward()
    assert ours.num_batches_tracked.item() == theirs.num_batches_tracked.item()
    torch.testing.assert_close(ours.running_var, theirs.running_var, **CLOSE_OF_A_LAYER)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, **CLOSE_OF_A_LAYER)


@pytest.mark.parametrize(
    ("name", "value"),
    [("activation", nn.ReLU()), ("activation_param", "0.1"), ("activation_param", [1.0])],
    ids=str,
)
def test_what_is_of_another_type(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"expected {name} as a n"):
        bnext.BatchNorm1d(3, **({"activation": "elu"} | {name: value}))
