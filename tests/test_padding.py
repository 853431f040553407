"""Batches with padding, by the README's recipe: it counts for nothing, in statistics and gradients, compiled or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnext
from bits import assert_same_bits
from layers import CLOSE_OF_A_LAYER

LENGTHS = (7, 1, 4, 0)
C = 5


def apply_where(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    valid = mask.nonzero(as_tuple=True)
    rows = x.movedim(1, -1)
    return torch.zeros_like(rows).index_put(valid, layer(rows[valid])).movedim(-1, 1)


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(lengths)[:, None]


def batch(padding: float, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(len(LENGTHS), C, max(LENGTHS), dtype=dtype)
    return x.masked_fill(~mask_of(*LENGTHS)[:, None], padding)


def layer_of(training: bool, dtype: torch.dtype = torch.float32, **options: str) -> bnext.BatchNorm1d:
    torch.manual_seed(1)
    layer = bnext.BatchNorm1d(C, dtype=dtype, **options)
    nn.init.normal_(layer.weight)
    return layer.train(training)


Call = Callable[[nn.Module, Tensor, Tensor], Tensor]


def step(layer: nn.Module, x: Tensor, call: Call = apply_where) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = call(layer, x, mask_of(*LENGTHS))
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(layer.named_buffers())}


@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_layer_of_what_is_valid(training: bool) -> None:
    ours = layer_of(training, torch.float64)
    torchs = nn.BatchNorm1d(C, dtype=torch.float64).train(training)
    torchs.load_state_dict(ours.state_dict())
    x = batch(3.0, torch.float64)
    torch.testing.assert_close(step(ours, x), step(torchs, x), **CLOSE_OF_A_LAYER)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}], ids=str)
def test_padding_counts_for_nothing(training: bool, options: dict[str, str]) -> None:
    zeros = step(layer_of(training, **options), batch(0.0))
    padded = ~mask_of(*LENGTHS)[:, None].expand(-1, C, -1)
    for padding in (1e30, torch.inf, torch.nan):
        found = step(layer_of(training, **options), batch(padding))
        assert_same_bits([*found.values()], [*zeros.values()], [*zeros])
        assert not found["dx"][padded].any() and not found["y"][padded].any()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_in_one_graph(training: bool, backend: str) -> None:
    """The number of valid values is known when the graph runs, and so is whether it is enough."""
    compiled: Call = torch.compile(apply_where, fullgraph=True, backend=backend)
    layer = layer_of(training)
    found, expected = step(layer, batch(0.0), compiled), step(layer_of(training), batch(0.0))
    assert_same_bits([*found.values()], [*expected.values()], [*expected])
    x, one_value = batch(0.0), mask_of(0, 1, 0, 0)
    if training:
        before = layer.running_mean.clone()
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            apply_where(layer, x, one_value)
        with pytest.raises(RuntimeError, match=r"Ne\(\w+, 1\)|Expected more than 1 value"):
            compiled(layer, x, one_value)
        assert torch.equal(layer.running_mean, before)
    else:
        assert torch.equal(compiled(layer, x, one_value), apply_where(layer, x, one_value))
