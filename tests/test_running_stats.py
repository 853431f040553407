"""The running statistics and the batch counter: when they move, by how much, and when nothing may touch them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnext
import notebook
from bnext.functional import batch_norm
from cases import (
    BFLOAT16_WITH_FLOAT32,
    DTYPES,
    EXTREMES,
    FLOAT32,
    FLOAT64,
    LAYOUT,
    LAYOUTS,
    SHAPE_OF_RANK,
    SIZES,
    TRAIN,
    Dtypes,
    Layout,
)
from problem import make


def batches(count: int, device: str, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [
        torch.randn(shape or (4, 3, 5, 5), generator=generator).mul(i + 1).to(device) for i in range(count)
    ]


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_state(layer: nn.Module, expected: dict[str, Tensor], *but: str) -> None:
    for name, tensor in layer.state_dict().items():
        assert name in but or torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_matrix(layout: Layout, dtypes: Dtypes, unbiased: bool, device: str) -> None:
    problem = make(SHAPE_OF_RANK[layout.rank], layout, dtypes, TRAIN, device=device)
    problem.unbiased = unbiased
    problem.forward()
    problem.check_running(0.1)
    assert problem.running_mean is not None and problem.running_mean.dtype == dtypes.parameters


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_sizes(shape: tuple[int, ...], layout: str, device: str) -> None:
    problem = make(shape, LAYOUT[layout], FLOAT32, TRAIN, device=device)
    problem.forward()
    problem.check_running(0.1)


@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("momentum", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("shape", EXTREMES, ids=str)
def test_extremes(shape: tuple[int, ...], momentum: float, dtypes: Dtypes, device: str) -> None:
    layout = {2: "nc", 3: "ncl", 4: "nchw"}[len(shape)]
    problem = make(shape, LAYOUT[layout], dtypes, TRAIN, device=device)
    problem.momentum = momentum
    problem.forward()
    problem.check_running(momentum)


def test_reproduces_the_notebook(device: str) -> None:
    """Momentum 1 - 0.9 and the biased variance: the notebook's layer, printed digit for printed digit."""
    data = torch.from_numpy(notebook.data()).to(device)
    layer = bnext.BatchNorm1d(
        5, momentum=1 - 0.9, unbiased_running_var=False, dtype=torch.float64, device=device
    )
    assert notebook.printed(layer(data).detach().cpu().numpy()) == notebook.TRAINING
    layer.eval()
    assert notebook.printed(layer(data).detach().cpu().numpy()).startswith(notebook.INFERENCE_BEGINNING)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_cumulative_average(layout: str, unbiased: bool, device: str) -> None:
    """momentum=None: the plain mean of all batches' statistics, whatever the buffers held before the first."""
    layer = bnext.BatchNorm2d(
        3, momentum=None, unbiased_running_var=unbiased, dtype=torch.float64, device=device
    )
    layer.running_mean.fill_(1e3)
    seen = [LAYOUT[layout].arrange(x.double()) for x in batches(5, device)]
    for number, x in enumerate(seen, start=1):
        layer(x)
        assert layer.num_batches_tracked.item() == number
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.var((0, 2, 3), correction=int(unbiased)) for x in seen]).mean(0)
    # The first update multiplies 1e3 by 1 - 1/1 = 0; what follows is a dozen roundings of values below 30.
    torch.testing.assert_close(layer.running_mean, means, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.running_var, variances, rtol=1e-14, atol=0)


def test_cumulative_average_goes_on_from_the_counter(device: str) -> None:
    """A counter beyond 2^24, which float32 cannot count to: the factor is 1 / (2^30 + 1)."""
    layer = bnext.BatchNorm2d(3, momentum=None, dtype=torch.float64, device=device)
    layer.num_batches_tracked.fill_(2**30)
    x = batches(1, device)[0].double()
    layer(x)
    assert layer.num_batches_tracked.item() == 2**30 + 1
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)) / (2**30 + 1), rtol=1e-12, atol=0)


def test_cumulative_average_without_counter_stands_still(device: str) -> None:
    """As in torch, where the factor is then 0."""
    layer = bnext.BatchNorm2d(3, momentum=None, device=device)
    layer.num_batches_tracked = None
    before = state(layer)
    layer(batches(1, device)[0])
    assert_same_state(layer, before)


def test_function_counts_when_given_a_counter(device: str) -> None:
    mean, var, counter = (
        torch.zeros(3, device=device),
        torch.ones(3, device=device),
        torch.tensor(3, device=device),
    )
    x = batches(1, device)[0]
    bnext.functional.batch_norm(x, mean, var, training=True, momentum=None, num_batches_tracked=counter)
    assert counter.item() == 4
    torch.testing.assert_close(mean, x.mean((0, 2, 3)) / 4)
    bnext.functional.batch_norm(x, mean, var, training=False, num_batches_tracked=counter)
    assert counter.item() == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_momentum_zero_is_untouched(value: float, device: str) -> None:
    """Even by a NaN, which 0 * NaN would let through (torch does)."""
    layer = bnext.BatchNorm2d(3, momentum=0.0, device=device)
    layer.running_mean.normal_()
    before = state(layer)
    x = batches(1, device)[0]
    x[0, 1, 2, 3] = value
    layer(x)
    assert_same_state(layer, before, "num_batches_tracked")
    assert layer.num_batches_tracked.item() == 1


def test_eval_moves_nothing(device: str) -> None:
    layer = bnext.BatchNorm2d(3, device=device)
    layer(batches(1, device)[0])
    before = state(layer)
    layer.eval()(batches(1, device)[0])
    assert_same_state(layer, before)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_empty_batch_only_counts(shape: tuple[int, ...], momentum: float | None, device: str) -> None:
    layer = bnext.BatchNorm2d(3, momentum=momentum, device=device)
    before = state(layer)
    layer(torch.empty(shape, device=device))
    assert_same_state(layer, before, "num_batches_tracked")
    assert layer.num_batches_tracked.item() == 1


def test_flag_turned_off_on_a_tracked_layer(device: str) -> None:
    """Training then leaves the buffers and the counter, eval still uses them."""
    x = batches(1, device)[0]
    layer = bnext.BatchNorm2d(3, device=device)
    layer(x)
    before = state(layer)
    expected = layer.eval()(x)
    layer.track_running_stats = False
    layer.train()(x)
    assert_same_state(layer, before)
    assert torch.equal(layer.eval()(x), expected)


def test_backward_and_second_forward_do_not_move_them(device: str) -> None:
    layer = bnext.BatchNorm2d(3, device=device)
    x = batches(1, device)[0].requires_grad_()
    y = layer(x)
    before = state(layer)
    y.sum().backward()
    assert_same_state(layer, before)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_moved_in_every_grad_mode(grad_mode: type, device: str) -> None:
    x = batches(1, device)[0]
    layer, expected = bnext.BatchNorm2d(3, device=device), bnext.BatchNorm2d(3, device=device)
    expected(x)
    with grad_mode():
        layer(x)
    assert_same_state(layer, state(expected))
    assert not layer.running_mean.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_those_that_require_grad(training: bool, device: str) -> None:
    """An error only where gradients are recorded, as torch has it."""
    x = batches(1, device)[0]
    mean, var = torch.zeros(3, device=device, requires_grad=True), torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="running_mean is not differentiable"):
        batch_norm(x, mean, var, training=training)
    with torch.no_grad():
        batch_norm(x, mean, var, training=training)
    assert bool(mean.any()) == training


@pytest.mark.parametrize("training", [True, False])
def test_those_of_inference_mode_do_not_move_outside(training: bool, device: str) -> None:
    """As torch has it."""
    results = []
    for kind in (bnext.BatchNorm2d, nn.BatchNorm2d):
        with torch.inference_mode():
            layer = kind(3, device=device)
        layer.train(training)
        before, (x,) = state(layer), batches(1, device)
        with torch.no_grad():
            if training:
                with pytest.raises(
                    RuntimeError, match="Inplace update to inference tensor outside InferenceMode"
                ):
                    layer(x)
            else:
                results.append(layer(x))
        if kind is not nn.BatchNorm2d:  # torch's has counted the batch by then
            assert_same_state(layer, before)
    if not training:
        torch.testing.assert_close(*results)


def test_update_bn_recomputes_them(device: str) -> None:
    """torch.optim.swa_utils.update_bn finds our layers, sets momentum=None, and puts it back."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bnext.BatchNorm2d(4)).to(device, torch.float64)
    loader = [x.double() for x in batches(4, device)]
    torch.optim.swa_utils.update_bn(loader, model)
    assert model[1].momentum == 0.1
    assert model[1].num_batches_tracked.item() == 4
    means = torch.stack([model[0](x).mean((0, 2, 3)) for x in loader]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_many_updates_follow_the_reference(layout: str, device: str) -> None:
    """Fifty steps in float32: each rounds the buffers once, and 0.9 forgets, so ten roundings bound the sum."""
    layer = bnext.BatchNorm2d(3, unbiased_running_var=False, device=device)
    reference = bnext.reference.BatchNorm(3, momentum=1 - 0.1)
    for x in batches(50, device):
        layer(LAYOUT[layout].arrange(x))
        reference.forward(x.double().cpu().numpy())
    near = {"rtol": 10 * 2**-24 * 4, "atol": 1e-6}
    np.testing.assert_allclose(layer.running_mean.cpu(), reference.running_mean, **near)
    np.testing.assert_allclose(layer.running_var.cpu(), reference.running_var, **near)
