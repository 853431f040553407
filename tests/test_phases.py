"""The phases as operators: opcheck, a batch in two parts against the reference, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from cases import (
    BFLOAT16_WITH_FLOAT32,
    DTYPES,
    FLOAT32,
    FLOAT64,
    LAYOUT,
    LAYOUTS,
    SHAPE_OF_RANK,
    UNTRACKED,
    Active,
    Dtypes,
    Layout,
)
from operators import PHASES, moments_of
from problem import Problem, make, make_active


def of_mask(mask: Tensor) -> Tensor | None:
    return mask if mask.numel() else None


def merged(parts: list[Tensor]) -> tuple[Tensor, int]:
    """Moments of all elements from those of parts, the plain way."""
    counts = [part.numel() // part.shape[1] for part in parts]
    moments = [moments_of(part) for part in parts]
    count = sum(counts)
    mean = sum(n * m[0] for n, m in zip(counts, moments, strict=True)) / count
    var = sum(n * (m[1] + (m[0] - mean) ** 2) for n, m in zip(counts, moments, strict=True)) / count
    return torch.stack([mean, var]), count


def solve(problem: Problem, ends: list[int]) -> None:
    """In parts of the batch, up to these samples, and judged as a whole."""
    p = problem
    activation = p.activation, p.activation_param

    def parts_of(whole: Tensor | None) -> list[Any]:
        bounds = list(zip([0, *ends], [*ends, len(p.x)], strict=True))
        return [None if whole is None else whole[a:b] for a, b in bounds]

    xs, residuals, dys = parts_of(p.x), parts_of(p.residual), parts_of(p.dy)
    moments, count = merged(xs)
    found = []
    for x, residual, dy in zip(xs, residuals, dys, strict=True):
        y, stats, mask = PHASES.normalize(
            x, residual, p.weight, p.bias, moments, p.eps, *activation, for_backward=True
        )
        needed = residual if p.activation is not None and not mask.numel() else None
        given = (dy, x, needed, of_mask(mask), p.weight, p.bias, stats)
        found.append((y, given, PHASES.grad_sums(*given, *activation)))
    total = sum(sums for _, _, (sums, _, _) in found)
    wants_residual = p.residual is not None and p.activation is not None
    grads = [
        PHASES.input_grad(
            *given, total * (x.numel() // x.shape[1] / count), *activation, [True, wants_residual]
        )
        for x, (_, given, _) in zip(xs, found, strict=True)
    ]
    p.check_output(torch.cat([y for y, _, _ in found]))
    p.check_input_grad(torch.cat([dx for dx, _ in grads]))
    if wants_residual:
        p.check_residual_grad(torch.cat([dresidual for _, dresidual in grads]))
    dweight, dbias = (sum(of[k].double() for _, _, of in found) for k in (1, 2))
    wide = torch.float64 if p.x.dtype == torch.float64 else torch.float32
    p.check_weight_grad(dweight.to(wide))
    p.check_bias_grad(dbias.to(wide))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("active", [None, *map(Active, ("relu", "leaky_relu", "gelu"))], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_in_parts(dtypes: Dtypes, layout: Layout, active: Active | None, joined: bool, device: str) -> None:
    problem = make_active(
        active,
        SHAPE_OF_RANK[layout.rank],
        layout,
        dtypes,
        UNTRACKED,
        device=device,
        residual=layout if joined else None,
    )
    solve(problem, [1])
    solve(problem, [0, 1, 1])


@pytest.mark.parametrize("shape", [(32, 64, 28, 28), (3, 2048, 7, 7), (2, 7, 150, 150), (600, 3, 3, 3)])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
def test_sizes(dtypes: Dtypes, layout: str, shape: tuple[int, ...], device: str) -> None:
    """Slabs, chunks and threads as larger tensors have them."""
    solve(make_active(Active("relu"), shape, LAYOUT[layout], dtypes, UNTRACKED, device=device), [1])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_same_bits_for_any_number_of_threads(threads: int, restore_threads: None) -> None:
    problem = make((64, 24, 28, 28), LAYOUT["nhwc"], FLOAT32, UNTRACKED)
    results = []
    for used in (1, threads):
        torch.set_num_threads(used)
        moments = moments_of(problem.x)
        _, stats, _ = PHASES.normalize(problem.x, None, None, None, moments, 1e-5, None, None, True)
        given = (problem.dy, problem.x, None, None, None, None, stats)
        sums, _, _ = PHASES.grad_sums(*given, None, None)
        results.append((moments, sums, PHASES.input_grad(*given, sums, None, None, [True, False])[0]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64], ids=str)
def test_moments_are_those_of_the_whole_operator(dtypes: Dtypes, device: str) -> None:
    """To the bit, and the variance itself where its inverse root would say nothing."""
    problem = make((6, 5, 9, 9), LAYOUT["nchw"], dtypes, UNTRACKED, device=device)
    mean, var = moments_of(problem.x)
    _, stats, _ = PHASES.batch_norm(
        problem.x, None, None, None, None, None, None, True, 0.1, 1e-5, True, [], None, None, False
    )
    assert torch.equal(mean, stats[0])
    torch.testing.assert_close((var + 1e-5).rsqrt(), stats[1], rtol=1e-15, atol=0)
    constant = moments_of(torch.full((2, 3, 4), 1e7, device=device))
    assert torch.equal(constant.cpu(), torch.tensor([[1e7] * 3, [0.0] * 3], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (2, 3, 0)])
def test_of_nothing(shape: tuple[int, ...], device: str) -> None:
    x = torch.empty(shape, device=device)
    assert torch.equal(moments_of(x).cpu(), torch.zeros(2, 3, dtype=torch.float64))
    moments = torch.ones(2, 3, dtype=torch.float64, device=device)
    y, stats, _ = PHASES.normalize(x, None, None, None, moments, 1e-5, "relu", None, True)
    given = (x, x, None, None, None, None, stats)
    sums, dweight, dbias = PHASES.grad_sums(*given, "relu", None)
    assert y.shape == shape and not sums.any() and not dweight.any() and not dbias.any()
    dx, _ = PHASES.input_grad(*given, sums, "relu", None, [True, False])
    assert dx.shape == shape


def calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Of each phase."""
    problem = make_active(
        Active("relu"),
        (3, 5, 4, 5),
        LAYOUT["nhwc"],
        FLOAT32,
        UNTRACKED,
        device=device,
        residual=LAYOUT["nhwc"],
    )
    p = problem
    moments = moments_of(p.x)
    normalize = (p.x, p.residual, p.weight, p.bias, moments, p.eps, "relu", None, True)
    _, stats, mask = PHASES.normalize(*normalize)
    given = (p.dy, p.x, None, mask, p.weight, p.bias, stats)
    sums, _, _ = PHASES.grad_sums(*given, "relu", None)
    return {
        "moments": (
            p.x,
            p.residual,
            p.weight,
            p.bias,
            None,
            None,
            torch.tensor(0, device=device),
            p.eps,
            "relu",
            None,
        ),
        "normalize": normalize,
        "grad_sums": (*given, "relu", None),
        "input_grad": (*given, sums, "relu", None, [True, True]),
    }


@pytest.mark.parametrize("phase", ["moments", "normalize", "grad_sums", "input_grad"])
def test_opcheck(phase: str, device: str) -> None:
    opcheck(getattr(PHASES, phase).default, calls(device)[phase])


@pytest.mark.parametrize("phase", ["moments", "normalize", "grad_sums", "input_grad"])
def test_no_derivative_is_no_zero(phase: str) -> None:
    first, *rest = calls("cpu")[phase]
    result = getattr(PHASES, phase)(first.requires_grad_(), *rest)
    result = result if isinstance(result, Tensor) else result[0]
    with pytest.raises(RuntimeError, match=f"derivative for bnext::{phase} is not implemented"):
        result.sum().backward()
