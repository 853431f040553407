"""Batches that are not finite, and running statistics that skip them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bnext
import host_engine
from bnext.functional import batch_norm
from cases import DTYPES, FLOAT16, FLOAT32, LAYOUT, SHAPE_OF_RANK, TRAIN, Dtypes
from host_calls import HostCall, Schedule
from problem import make

BAD = [1, 3]  # channels of five
GOOD = [0, 2, 4]
VALUES = [float("nan"), float("inf"), -float("inf")]


def spoil(x: Tensor, value: float) -> Tensor:
    """One element of each of the BAD channels."""
    x = x.clone(memory_format=torch.preserve_format)
    for channel in BAD:
        x.select(1, channel)[(-1,) * (x.dim() - 1)] = value
    return x


def layers(dtype: torch.dtype, device: str, **options: object) -> list[bnext.SyncBatchNorm]:
    """One that skips, one that does not, with statistics of a batch before."""
    made = []
    for skips in (True, False):
        layer = bnext.SyncBatchNorm(5, skip_nonfinite=skips, **options).to(device, dtype)
        layer(torch.randn(6, 5, generator=torch.Generator().manual_seed(9)).to(device, dtype) + 1)
        made.append(layer)
    return made


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_skips(layout: str, dtypes: Dtypes, momentum: float | None, value: float, device: str) -> None:
    """By channel; all else is as without, where such a batch spoils statistics as it does torch's."""
    shape = SHAPE_OF_RANK[LAYOUT[layout].rank]
    x = spoil(make(shape, LAYOUT[layout], dtypes, TRAIN, device=device).x, value)
    skipping, plain = layers(dtypes.parameters, device, momentum=momentum)
    before = {name: b.clone() for name, b in skipping.named_buffers()}
    assert torch.equal(skipping(x).nan_to_num(7), plain(x).nan_to_num(7))
    for name in ("running_mean", "running_var"):
        ours, spoilt = skipping.get_buffer(name), plain.get_buffer(name)
        assert torch.equal(ours[BAD], before[name][BAD]) and not spoilt[BAD].isfinite().any()
        assert torch.equal(ours[GOOD], spoilt[GOOD]) and not torch.equal(ours[GOOD], before[name][GOOD])
    assert skipping.num_batches_tracked == plain.num_batches_tracked == 2


def test_large_is_finite(device: str) -> None:
    """The largest float16, and float32 of which sums of squares overflow, count as any other."""
    for dtype, value in ((torch.float16, 65504.0), (torch.float32, 1.5e19)):
        x = torch.tensor([[value], [-value / 2]], dtype=dtype, device=device)
        mean, var = torch.zeros(1, device=device), torch.ones(1, device=device)
        batch_norm(x, mean, var, training=True, momentum=0.5, skip_nonfinite=True)
        assert mean.item() == pytest.approx(0.5 * x.double().mean().item())


@pytest.mark.parametrize("kind", [bnext.BatchNorm1d, bnext.SyncBatchNorm])
def test_what_the_buffers_cannot_hold_is_skipped(kind: type[nn.Module], device: str) -> None:
    """A variance of finite input that is none in float32, or in float16."""
    for dtype, value in ((torch.float32, 1e30), (torch.float16, 400.0)):
        x = torch.tensor([[value, 1.0], [-value, -1.0]], dtype=dtype, device=device)
        layer = kind(2, momentum=1.0, skip_nonfinite=True).to(device, dtype)
        layer(x)
        assert layer.running_mean[0] == 0 and layer.running_var.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", [bnext.BatchNorm1d, bnext.SyncBatchNorm])
def test_other_ways_into_a_layer(kind: type[nn.Module], device: str) -> None:
    """In place, and synchronized."""
    x = spoil(torch.randn(6, 5, device=device), float("nan"))
    layer = kind(5, skip_nonfinite=True).to(device)
    if kind is bnext.BatchNorm1d:
        layer.inplace = True
        layer(x.clone())
    else:
        layer(x)
    assert layer.running_mean.isfinite().all() and layer.running_mean[GOOD].all()
    assert not layer.running_mean[BAD].any()
    assert "skip_nonfinite=True" in repr(layer)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_gradients_of_an_infinite_one(layout: str, dtypes: Dtypes, training: bool, device: str) -> None:
    """As torch has them: dweight and dbias infinite with torch's sign, NaN where both signs meet."""
    problem = make(SHAPE_OF_RANK[LAYOUT[layout].rank], LAYOUT[layout], dtypes, TRAIN, device=device)
    dy = problem.dy
    for channel, index, value in ((1, 0, "inf"), (2, -1, "-inf"), (3, 0, "inf"), (3, -1, "-inf")):
        dy.select(1, channel)[(index,) * (dy.dim() - 1)] = float(value)
    results = []
    for function in (batch_norm, nn.functional.batch_norm):
        leaves = [t.detach().clone().requires_grad_() for t in (problem.x, problem.weight, problem.bias)]
        y = function(leaves[0], problem.running_mean, problem.running_var, *leaves[1:], training)
        results.append(torch.autograd.grad(y, leaves, dy))
    for name, ours, theirs in zip(("dx", "dweight", "dbias"), *results, strict=True):
        if name == "dx" and training:  # an infinity or NaN, by the order of sums
            assert not ours[:, [1, 2, 3]].isfinite().any() and ours[:, [0, 4]].isfinite().all()
            continue
        odd = ~theirs.isfinite()
        assert torch.equal(odd, ~ours.isfinite()) and odd.any()
        torch.testing.assert_close(ours[odd], theirs[odd], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_an_infinite_running_mean(layout: str, dtypes: Dtypes, value: float, device: str) -> None:
    """In eval what torch gives of it, outputs and gradients."""
    problem = make(SHAPE_OF_RANK[LAYOUT[layout].rank], LAYOUT[layout], dtypes, TRAIN, device=device)
    problem.running_mean[1] = value
    results = []
    for function in (batch_norm, nn.functional.batch_norm):
        leaves = [t.detach().clone().requires_grad_() for t in (problem.x, problem.weight, problem.bias)]
        y = function(leaves[0], problem.running_mean, problem.running_var, *leaves[1:])
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    for ours, theirs in zip(*results, strict=True):
        odd = ~theirs.isfinite()
        assert torch.equal(odd, ~ours.isfinite())
        torch.testing.assert_close(ours[odd], theirs[odd], rtol=0, atol=0, equal_nan=True)


def test_under_vmap(device: str) -> None:
    x = torch.stack([spoil(torch.randn(6, 5, device=device), value) for value in (float("nan"), 1.0)])
    mean, var = torch.zeros(2, 5, device=device), torch.ones(2, 5, device=device)
    torch.vmap(lambda x, m, v: batch_norm(x, m, v, training=True, skip_nonfinite=True))(x, mean, var)
    assert not mean[0, BAD].any() and mean[0, GOOD].all() and mean[1].all()


def test_a_scaled_step() -> None:
    """What it is for: a step that a gradient scaler skips leaves the layer in order, for eval too."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), bnext.BatchNorm1d(5, skip_nonfinite=True))
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu")
    for size in (1.0, 1e6, 1.0):
        with torch.autocast("cpu", torch.float16):
            y = network(torch.randn(8, 4) * size)
        assert y.dtype == torch.float16 and y.isfinite().all() == (size == 1)
        scaler.scale(y.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(t.isfinite().all() for t in network.state_dict().values())


@pytest.mark.parametrize("engine", ["streaming", "resident"])
@pytest.mark.parametrize("value", VALUES)
def test_on_host(engine: str, value: float) -> None:
    """The CUDA kernels' folds."""
    calls = []
    for layout in ("nc", "nchw", "nhwc"):
        for skips in (True, False):
            for dtypes in (FLOAT32, FLOAT16):
                problem = make(SHAPE_OF_RANK[LAYOUT[layout].rank], LAYOUT[layout], dtypes, TRAIN)
                problem.x, problem.skip_nonfinite = spoil(problem.x, value), skips
                calls.append(HostCall(problem, Schedule(engine=engine), backward=False))
    for call, result in zip(calls, host_engine.run(calls), strict=True):
        p = call.problem
        assert result.running_mean is not None and result.running_var is not None
        for new, old in ((result.running_mean, p.running_mean), (result.running_var, p.running_var)):
            assert old is not None and new[GOOD].isfinite().all() and (new[GOOD] != old[GOOD]).all()
            if p.skip_nonfinite:
                assert torch.equal(new[BAD], old[BAD])
            else:
                assert not new[BAD].isfinite().any()
