"""The forward pass against the float64 reference: every layout, dtype, mode and parameter set, and awkward sizes."""

from __future__ import annotations

import pytest
import torch

from bnext.functional import batch_norm
from cases import (
    BFLOAT16_WITH_FLOAT32,
    DTYPES,
    EXTREMES,
    FLOAT32,
    FLOAT64,
    KEPT_OF_RANK,
    LAYOUT,
    LAYOUTS,
    MATRICES,
    MODES,
    PARAMETERS,
    SHAPE_OF_RANK,
    SHORT_PLANES,
    SIZES,
    TRAIN,
    VOLUMES,
    Dtypes,
    Layout,
    Mode,
)
from problem import make


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda names: "+".join(names) or "plain")
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_matrix(layout: Layout, dtypes: Dtypes, mode: Mode, parameters: tuple[str, ...], device: str) -> None:
    problem = make(SHAPE_OF_RANK[layout.rank], layout, dtypes, mode, parameters, device=device)
    before = problem.x.clone()
    y = problem.forward()
    problem.check_output(y)
    assert y.is_contiguous(memory_format=layout.kept)
    assert torch.equal(problem.x, before), "the input was written to"


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [*SIZES, *SHORT_PLANES], ids=str)
def test_sizes(shape: tuple[int, ...], layout: str, dtypes: Dtypes, device: str) -> None:
    problem = make(shape, LAYOUT[layout], dtypes, TRAIN, device=device)
    problem.check_output(problem.forward())


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("shape", MATRICES + VOLUMES + EXTREMES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_other_ranks_and_extremes(shape: tuple[int, ...], mode: Mode, dtypes: Dtypes, device: str) -> None:
    for layout in KEPT_OF_RANK[len(shape)]:
        problem = make(shape, layout, dtypes, mode, device=device)
        y = problem.forward()
        problem.check_output(y)
        assert y.is_contiguous(memory_format=layout.kept)


@pytest.mark.parametrize("shape", [(3, 4, 2, 3, 2, 3), (2, 3, 2, 1, 2, 3, 2)], ids=str)
def test_function_takes_any_rank(shape: tuple[int, ...], device: str) -> None:
    layout = Layout("planes", len(shape), torch.contiguous_format, torch.Tensor.contiguous)
    problem = make(shape, layout, FLOAT64, TRAIN, device=device)
    problem.check_output(problem.forward())


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4), (0, 3, 2, 2, 2), (0, 3, 0)], ids=str)
def test_empty(shape: tuple[int, ...], mode: Mode, device: str) -> None:
    zeros, ones = torch.zeros(3, device=device), torch.ones(3, device=device)
    running = (zeros.clone(), ones.clone()) if mode.tracked else (None, None)
    y = batch_norm(torch.empty(shape, device=device), *running, ones, zeros, mode.batch)
    assert y.shape == shape
    if mode.tracked:
        assert torch.equal(torch.stack(running), torch.stack((zeros, ones))), "nothing was seen"


@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_parameters_of_any_stride(layout: str, device: str) -> None:
    """Vectors may be columns of something larger, and expanded."""
    shape = SHAPE_OF_RANK[LAYOUT[layout].rank]
    problem = make(shape, LAYOUT[layout], FLOAT32, TRAIN, device=device)
    for name in ("weight", "running_mean", "running_var"):
        dense = getattr(problem, name)
        setattr(problem, name, torch.stack((dense, torch.full_like(dense, float("nan"))), dim=1)[:, 0])
    problem.bias = torch.ones(1, device=device).expand(shape[1])
    problem.check_output(problem.forward())
    problem.check_running(0.1)


def test_same_values_whatever_the_layout(device: str) -> None:
    """Not the same bits: planes and rows add in another order. But each within its bound of one reference."""
    problem = make((4, 19, 9, 11), LAYOUT["nchw"], FLOAT32, TRAIN, device=device)
    for layout in (LAYOUT["nhwc"], LAYOUT["hwnc"], LAYOUT["nchw_misaligned"]):
        problem.x = layout.arrange(problem.x)
        problem.check_output(problem.forward())


@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(dtype: torch.dtype, layout: str, device: str) -> None:
    """Mean 0, variance 1, eps 0: y = x * weight, one product and one rounding, so exactly what torch's cast gives.

    Signs of zero are left out (x * weight + 0 may lose them), and which NaN a NaN becomes.
    """
    x = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device)
        .to(torch.int16)
        .view(dtype)
        .view(-1, 2)
    )
    x = x if layout == "nc" else LAYOUT[layout].arrange(x.reshape(64, 2, 16, 32))
    zeros, ones = torch.zeros(2, device=device), torch.ones(2, device=device)
    for factor in (1.0, 1 / 3, 1.001953125):
        y = batch_norm(x, zeros, ones, ones * factor, None, training=False, eps=0.0)
        expected = (x.float() * torch.tensor(factor, device=device)).to(dtype)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))
