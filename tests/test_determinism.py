"""The same bits for any number of threads, from run to run, and wherever in memory the input lies.

Work is cut by shape alone and partial results are merged in a fixed order: it does not matter who did which part.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cases import (
    BFLOAT16_WITH_FLOAT32,
    EVAL,
    FLOAT32,
    FLOAT64,
    LAYOUT,
    TRAIN,
    Active,
    Dtypes,
    Mode,
    misaligned,
)
from problem import Problem, make, make_active

# Large enough that a plan splits them, in both directions: over channels, over the batch, within a plane.
LARGE = [
    ("nc", (100_003, 3)),  # few channels: only the batch can be split
    ("nc", (2, 65_536)),  # two rows: only the channels can
    ("nc", (4_099, 257)),
    ("ncl", (33, 65, 501)),
    ("nchw", (32, 32, 32, 32)),
    ("nhwc", (32, 32, 32, 32)),
    ("nchw", (1, 3, 513, 511)),  # planes longer than a chunk
    ("nhwc", (1, 3, 513, 511)),
    ("nchw", (64, 130, 7, 7)),  # planes shorter than a vector step
    ("nhwc", (64, 130, 7, 7)),
    ("nchw", (5, 1, 300, 301)),  # one channel: nothing but the batch and the plane to split
    ("ncdhw", (2, 19, 9, 30, 31)),
    ("ndhwc", (2, 19, 9, 30, 31)),
]
LARGE_IDS = [f"{layout}-{'x'.join(map(str, shape))}" for layout, shape in LARGE]
# One; as many as the smallest machine has; a prime that divides no split.
THREADS = [1, 2, 7]


def results(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, arrange: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Everything a training step leaves behind: y, dx, dweight, dbias and the running statistics."""
    problem = make(shape, LAYOUT[layout], dtypes, mode)
    problem.x = arrange(problem.x)
    problem.dy = arrange(problem.dy)
    return results_of(problem)


def results_of(problem: Problem) -> list[Tensor]:
    leaves = problem.require_grad()
    y = problem.forward()
    gradients = torch.autograd.grad(y, leaves, problem.dy)
    assert problem.running_mean is not None and problem.running_var is not None
    return [y.detach(), *gradients, problem.running_mean, problem.running_var]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    names = ["y", "dx", "dweight", "dbias", "running_mean", "running_var"]
    for name, one, other in zip(names, first, second, strict=True):
        assert torch.equal(one, other), f"{name}: {int((one != other).sum())} of {one.numel()} differ"


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize(("layout", "shape"), LARGE, ids=LARGE_IDS)
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
@pytest.mark.parametrize(("layout", "shape"), LARGE, ids=LARGE_IDS)
def test_any_number_of_threads_behind_an_activation(
    layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, active: Active
) -> None:
    collected = []
    for threads in THREADS[:2]:
        torch.set_num_threads(threads)
        collected.append(results_of(make_active(active, shape, LAYOUT[layout], dtypes, mode)))
    assert_same_bits(*collected)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize(("layout", "shape"), LARGE, ids=LARGE_IDS)
def test_from_run_to_run(layout: str, shape: tuple[int, ...]) -> None:
    torch.set_num_threads(3)  # more than there may be cores: the order of arrival varies
    first = results(layout, shape, FLOAT32, TRAIN, lambda t: t)
    for _ in range(3):
        assert_same_bits(first, results(layout, shape, FLOAT32, TRAIN, lambda t: t))


@pytest.mark.parametrize(("layout", "shape"), LARGE, ids=LARGE_IDS)
def test_wherever_the_input_lies(layout: str, shape: tuple[int, ...]) -> None:
    """An allocator's choice of address must not show in the result."""
    first = results(layout, shape, FLOAT32, TRAIN, lambda t: t)
    assert_same_bits(first, results(layout, shape, FLOAT32, TRAIN, misaligned))


@pytest.mark.parametrize(("layout", "shape"), LARGE, ids=LARGE_IDS)
def test_whatever_is_asked_for(layout: str, shape: tuple[int, ...]) -> None:
    """dx has the same bits whether or not the parameters' gradients are computed with it, and the other way round."""
    everything = results(layout, shape, FLOAT32, TRAIN, lambda t: t)
    for index, name in enumerate(("x", "weight", "bias"), start=1):
        problem = make(shape, LAYOUT[layout], FLOAT32, TRAIN)
        leaves = problem.require_grad(name)
        (alone,) = torch.autograd.grad(problem.forward(), leaves, problem.dy)
        assert torch.equal(alone, everything[index]), name
