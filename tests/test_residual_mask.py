"""The mask that forward leaves for backward, beside a residual or in place of x: size, bits, any number of threads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from bits import assert_same_bits
from bnext.functional import ACTIVATIONS
from cases import (
    BFLOAT16_WITH_FLOAT32,
    DTYPES,
    EVAL,
    FLOAT32,
    FLOAT64,
    KEPT_LAYOUTS,
    LAYOUT,
    MASK_SIZES,
    MODES,
    SHAPE_OF_RANK,
    SPLIT,
    SPLIT_IDS,
    THREADS,
    TRAIN,
    UNTRACKED,
    Active,
    Dtypes,
    Layout,
    Mode,
)
from judged import DIFFERENTIABLE, numpy
from operators import BACKWARD, FORWARD, backward_arguments, forward_arguments
from problem import Problem, make_active

MASKED = [Active("relu"), Active("leaky_relu"), Active("relu6")]
OTHERS = [None, *(Active(name) for name in ACTIVATIONS if name not in ("relu", "leaky_relu", "relu6"))]
every_masked = pytest.mark.parametrize("active", MASKED, ids=str)
joined_or_alone = pytest.mark.parametrize("joined", [True, False], ids=["residual", "alone"])


def masked(problem: Problem) -> tuple[Tensor, Tensor]:
    """y and the mask."""
    keeps_input = problem.residual is not None
    y, _, mask = FORWARD(*forward_arguments(problem, for_backward=True, keeps_input=keeps_input))
    assert mask.shape == (y.numel() // 32 * 4 + 8,)
    assert mask.dtype == torch.uint8 and mask.device == y.device
    return y, mask


def bits(mask: Tensor, like: Tensor) -> np.ndarray:
    """One per element, in the shape of `like`, in whose memory order they are."""
    flat = np.unpackbits(mask.cpu().numpy(), bitorder="little")[: like.numel()]
    return torch.from_numpy(flat).as_strided(like.shape, like.stride()).numpy().astype(bool)


def check_bits(problem: Problem) -> None:
    """Where z can be told from the places at which the gradient is blocked, and that is nearly everywhere."""
    y, mask = masked(problem)
    z, error = problem.affine
    known = np.minimum(np.abs(z), np.abs(z - 6) if problem.activation == "relu6" else np.inf) > error
    assert known.mean() > 0.99
    passes = (z > 0) & ((z < 6) | (problem.activation != "relu6"))
    got = bits(mask, y)
    np.testing.assert_array_equal(got[known], passes[known])
    if problem.activation != "relu6" or problem.x.dtype in (torch.float32, torch.float64):
        # A selection keeps the bits of z, so that y tells of every element.
        np.testing.assert_array_equal(
            got, (numpy(y) > 0) & ((numpy(y) < 6) | (problem.activation != "relu6"))
        )


@joined_or_alone
@every_masked
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", KEPT_LAYOUTS, ids=str)
def test_bits(layout: Layout, dtypes: Dtypes, mode: Mode, active: Active, joined: bool, device: str) -> None:
    shape = SHAPE_OF_RANK[layout.rank]
    residual = layout if joined else None
    check_bits(make_active(active, shape, layout, dtypes, mode, device=device, residual=residual))


@joined_or_alone
@every_masked
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
def test_bits_of_words_that_are_shared(
    mode: Mode, dtypes: Dtypes, active: Active, joined: bool, device: str
) -> None:
    """Channels, planes and tiles that end within a byte."""
    for name, shape in itertools.chain(*MASK_SIZES.values()):
        layout = LAYOUT[name]
        residual = layout if joined else None
        check_bits(make_active(active, shape, layout, dtypes, mode, device=device, residual=residual))


@every_masked
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_tells_what_the_input_does(dtypes: Dtypes, mode: Mode, active: Active, device: str) -> None:
    """Bit for bit, whatever is asked for. With fixed statistics the weight's gradient alone takes x besides."""
    shapes = [(layout.name, SHAPE_OF_RANK[layout.rank]) for layout in KEPT_LAYOUTS]
    for name, shape in [*shapes, *itertools.chain(*MASK_SIZES.values())]:
        problem = make_active(active, shape, LAYOUT[name], dtypes, mode, device=device)
        for wanted in ((True, True, True), (True, False, True), (True, False, False), (False, False, True)):
            found = BACKWARD(*backward_arguments(problem, wanted))
            dy, x, *others = backward_arguments(problem, wanted, keeps_input=False)
            assert others[1] is not None
            needed = mode.batch or wanted[1]
            by_mask = BACKWARD(dy, x if needed else torch.full_like(x, float("nan")), *others)
            for one, other in zip(by_mask, found, strict=True):
                assert torch.equal(one, other)


THREADED = [
    (MASKED[2], FLOAT32, TRAIN),
    (MASKED[1], BFLOAT16_WITH_FLOAT32, EVAL),
    (Active("silu"), FLOAT32, TRAIN),
]


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize(("active", "dtypes", "mode"), THREADED, ids=str)
@pytest.mark.parametrize(("layout", "shape"), SPLIT, ids=SPLIT_IDS)
def test_any_number_of_threads(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active
) -> None:
    """y, the mask, every gradient and the running statistics."""
    collected = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        problem = make_active(active, shape, LAYOUT[layout], dtypes, mode, residual=LAYOUT[layout])
        arguments = forward_arguments(problem, for_backward=True)
        y, stats, mask = FORWARD(*arguments)
        grads = BACKWARD(*backward_arguments(problem, (True, True, True, True)))
        alone = BACKWARD(*backward_arguments(problem, (True, False, False, True)))
        assert torch.equal(alone[0], grads[0]) and torch.equal(alone[3], grads[3])
        mask = torch.from_numpy(np.unpackbits(mask.numpy(), bitorder="little")[: y.numel()])
        collected.append([y, stats, mask, *grads, problem.running_mean, problem.running_var])
    names = ["y", "stats", "mask", *(f"d{name}" for name in DIFFERENTIABLE), "running_mean", "running_var"]
    for other in collected[1:]:
        assert_same_bits(collected[0], other, names)


@pytest.mark.parametrize("active", [*MASKED, *OTHERS], ids=str)
def test_none_where_it_is_not_needed(active: Active | None, device: str) -> None:
    """Where x is kept without a residual, without a backward, and for activations that one bit does not tell of."""
    problem = make_active(
        active, (3, 5, 4, 5), LAYOUT["nhwc"], FLOAT32, TRAIN, device=device, residual=LAYOUT["nhwc"]
    )
    _, _, mask = FORWARD(*forward_arguments(problem))
    assert mask.shape == (0,) and mask.dtype == torch.uint8
    if active not in MASKED:
        for keeps_input in (True, False):
            _, _, mask = FORWARD(*forward_arguments(problem, for_backward=True, keeps_input=keeps_input))
            assert mask.shape == (0,)
    problem.residual = None
    _, _, mask = FORWARD(*forward_arguments(problem, for_backward=True))
    assert mask.shape == (0,)


@every_masked
def test_not_a_number(active: Active, device: str) -> None:
    """Its gradient passes through relu and relu6, and is leaky_relu's slope, as in torch."""
    residual = torch.tensor([float("nan"), float("inf"), -float("inf"), 7, -7], device=device)
    problem = make_active(active, (4, 3, 5), LAYOUT["ncl"], FLOAT32, UNTRACKED, (), device=device)
    problem.x = torch.zeros(4, 3, 5, device=device)
    problem.residual = residual.expand(problem.x.shape)
    y, mask = masked(problem)
    expected = {"relu": "11010", "leaky_relu": "01010", "relu6": "10000"}[active.activation]
    assert ["".join(map(str, row)) for row in bits(mask, y)[:, 0].astype(int)] == [expected] * 4
