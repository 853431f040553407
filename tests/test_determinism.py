"""The same bits for any number of threads, from run to run, and wherever in memory the input lies.

Work is cut by shape alone and partial results are merged in a fixed order: it does not matter who did which part.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bits import assert_same_bits
from cases import (
    BFLOAT16_WITH_FLOAT32,
    EVAL,
    FLOAT32,
    FLOAT64,
    LAYOUT,
    SPLIT,
    SPLIT_IDS,
    THREADS,
    TRAIN,
    Active,
    Dtypes,
    Mode,
    misaligned,
)
from problem import make, make_active


def results(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, arrange: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    problem = make(shape, LAYOUT[layout], dtypes, mode)
    problem.x = arrange(problem.x)
    problem.dy = arrange(problem.dy)
    return problem.step()


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize(("layout", "shape"), SPLIT, ids=SPLIT_IDS)
def test_any_number_of_threads(layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode) -> None:
    collected = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        collected.append(results(layout, shape, dtypes, mode, lambda t: t))
    for other in collected[1:]:
        assert_same_bits(collected[0], other)


# One activation that stands in the loops, and one that they call.
@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("active", [Active("relu"), Active("gelu")], ids=str)
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize(("layout", "shape"), SPLIT, ids=SPLIT_IDS)
def test_any_number_of_threads_behind_an_activation(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active
) -> None:
    collected = []
    for threads in THREADS[:2]:
        torch.set_num_threads(threads)
        collected.append(make_active(active, shape, LAYOUT[layout], dtypes, mode).step())
    assert_same_bits(*collected)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize(("layout", "shape"), SPLIT, ids=SPLIT_IDS)
def test_from_run_to_run(layout: str, shape: tuple[int, ...]) -> None:
    torch.set_num_threads(3)  # more than there may be cores: the order of arrival varies
    first = results(layout, shape, FLOAT32, TRAIN, lambda t: t)
    for _ in range(3):
        assert_same_bits(first, results(layout, shape, FLOAT32, TRAIN, lambda t: t))


@pytest.mark.parametrize(("layout", "shape"), SPLIT, ids=SPLIT_IDS)
def test_wherever_the_input_lies(layout: str, shape: tuple[int, ...]) -> None:
    """An allocator's choice of address must not show in the result."""
    first = results(layout, shape, FLOAT32, TRAIN, lambda t: t)
    assert_same_bits(first, results(layout, shape, FLOAT32, TRAIN, misaligned))


@pytest.mark.parametrize(("layout", "shape"), SPLIT, ids=SPLIT_IDS)
def test_whatever_is_asked_for(layout: str, shape: tuple[int, ...]) -> None:
    """dx has the same bits whether or not the parameters' gradients are computed with it, and the other way round."""
    everything = results(layout, shape, FLOAT32, TRAIN, lambda t: t)
    for index, name in enumerate(("x", "weight", "bias"), start=1):
        problem = make(shape, LAYOUT[layout], FLOAT32, TRAIN)
        leaves = problem.require_grad(name)
        (alone,) = torch.autograd.grad(problem.forward(), leaves, problem.dy)
        assert torch.equal(alone, everything[index]), name
