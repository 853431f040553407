"""What the phases as operators refuse, and what they take although a whole call would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from operators import PHASES, moments_of

X = torch.ones(4, 3, 2)
STATS = torch.ones(2, 3, dtype=torch.float64)
SUMS = torch.ones(3, 2, dtype=torch.float64)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("moments", "text"),
    [
        (
            torch.ones(2, 4).double(),
            r"expected moments of size torch.Size\(\[2, 3\]\), but got torch.Size\(\[2, 4\]",
        ),
        (torch.ones(2, 3), "expected moments of dtype Double, but got Float"),
        (torch.ones(6).double(), "expected moments of size"),
        (torch.ones(4, 3).double(), "expected moments of size"),
    ],
)
def test_bad_moments(moments: Tensor, text: str, meta: bool) -> None:
    x, moments = (X.to("meta"), moments.to("meta")) if meta else (X, moments)
    with pytest.raises(RuntimeError, match=text):
        PHASES.normalize(x, None, None, None, moments, 1e-5, None, None, False)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("sums", "text"),
    [
        (
            torch.ones(2, 3).double(),
            r"expected sums of size torch.Size\(\[3, 2\]\), but got torch.Size\(\[2, 3\]\)",
        ),
        (torch.ones(3, 2), "expected sums of dtype Double, but got Float"),
    ],
)
def test_bad_sums(sums: Tensor, text: str, meta: bool) -> None:
    given = [X, X, STATS, sums]
    x, dy, stats, sums = [t.to("meta") for t in given] if meta else given
    with pytest.raises(RuntimeError, match=text):
        PHASES.input_grad(dy, x, None, None, None, None, stats, sums, None, None, [True, False])


def test_what_whole_operators_refuse_phases_refuse() -> None:
    with pytest.raises(NotImplementedError, match="not implemented for 'Int'"):
        moments_of(X.int())
    with pytest.raises(RuntimeError, match="weight should contain 3 elements not 4"):
        PHASES.normalize(X, None, torch.ones(4), None, STATS, 1e-5, None, None, False)
    with pytest.raises(RuntimeError, match="expected dy of the input's size"):
        PHASES.grad_sums(X[:1], X, None, None, None, None, STATS, None, None)
    with pytest.raises(RuntimeError, match="expected dresidual only with an activation and a residual"):
        PHASES.input_grad(X, X, None, None, None, None, STATS, SUMS, None, None, [True, True])


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"weight": torch.ones(4)}, "weight should contain 3 elements not 4"),
        ({"residual": X[:1]}, "expected residual of the input's size"),
        ({"running_mean": torch.ones(3)}, "running_mean and running_var must either both be None"),
        (
            {"running_mean": torch.ones(3).half(), "running_var": torch.ones(3).half()},
            "expected running_mean to have dtype Float",
        ),
        (
            {"running_mean": torch.ones(3, requires_grad=True), "running_var": torch.ones(3)},
            "running_mean is not differentiable",
        ),
        ({"num_batches_tracked": torch.tensor(0.0)}, "expected num_batches_tracked to be a single int64"),
        ({"eps": 0.0}, "batch_norm eps must be positive during training, but got 0.0"),
    ],
)
def test_moments_check_the_call_that_they_begin(given: dict[str, Any], text: str, meta: bool) -> None:
    if meta:
        given = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in given.items()}
    with pytest.raises((RuntimeError, ValueError), match=text), torch.no_grad():
        moments_of(X.to("meta") if meta else X, **given)


def test_running_statistics_that_overlap_themselves() -> None:
    expanded = torch.ones(1).expand(3)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        moments_of(X, running_mean=expanded, running_var=torch.ones(3))


def test_one_value_per_channel_may_have_company() -> None:
    assert moments_of(X[:1, :, :1]).shape == (2, 3)


def test_sums_off_a_boundary() -> None:
    """Pairs that begin anywhere."""
    memory = torch.zeros(7, dtype=torch.float64)
    memory[1:] = torch.arange(6.0)
    off, on = memory[1:].view(3, 2), memory[1:].clone().view(3, 2)
    one, other = (
        PHASES.input_grad(X, X, None, None, None, None, STATS, sums, None, None, [True, False])[0]
        for sums in (off, on)
    )
    assert torch.equal(one, other)
