"""Sizes and addresses that a GPU's kernels stumble over: grid limits, 32-bit indices, vectors across boundaries.

test_forward, test_backward and test_accuracy run on the GPU too; here are the shapes that are too large for a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import tolerances
from cases import DTYPES, EVAL, FLOAT16_WITH_FLOAT32, FLOAT32, LAYOUT, TRAIN, Dtypes, Mode, misaligned
from judged import numpy
from on_cuda import DEVICE, needs_cuda
from problem import Problem, make

pytestmark = needs_cuda


def check(problem: Problem) -> None:
    """Forward, backward and the running statistics against the reference."""
    problem.require_grad()
    y = problem.forward()
    problem.check_output(y)
    y.backward(problem.dy)
    problem.check_grads()
    if problem.batch:
        problem.check_running(0.1)


# A grid has at most 65535 blocks in y and z, and torch's cuDNN path ends there.
MANY = [("nc", (70_000, 3)), ("nchw", (70_000, 3, 2, 2)), ("nhwc", (70_000, 3, 2, 2)), ("nc", (3, 70_001))]


@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize(("layout", "shape"), MANY, ids=str)
def test_more_than_65535(layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode) -> None:
    check(make(shape, LAYOUT[layout], dtypes, mode, device=DEVICE))


# Several blocks in each direction, and a remainder in each: primes, planes of an odd size, rows of an odd length.
ODD = [
    ("nchw", (33, 65, 17, 31)),
    ("nhwc", (33, 65, 17, 31)),
    ("nchw", (5, 1001, 7, 9)),
    ("nhwc", (5, 1001, 7, 9)),
    ("nchw", (129, 67, 7, 7)),
    ("nhwc", (129, 67, 7, 7)),
    ("nchw", (2, 3, 401, 399)),
    ("nhwc", (2, 3, 401, 399)),
    ("nc", (4099, 257)),
    ("nc", (97, 10_007)),
    ("ncdhw", (3, 19, 9, 31, 33)),
    ("ndhwc", (3, 19, 9, 31, 33)),
]
ODD_IDS = [f"{layout}-{'x'.join(map(str, shape))}" for layout, shape in ODD]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "shape"), ODD, ids=ODD_IDS)
def test_odd_sizes(layout: str, shape: tuple[int, ...], dtypes: Dtypes) -> None:
    check(make(shape, LAYOUT[layout], dtypes, TRAIN, device=DEVICE))


# Sizes that whole vectors divide, at an address they do not.
EVEN = [("nchw", (16, 64, 28, 28)), ("nhwc", (16, 64, 28, 28)), ("nc", (4096, 256))]


@pytest.mark.parametrize("which", ["x", "dy", "both"])
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "shape"), EVEN, ids=str)
def test_one_element_off(layout: str, shape: tuple[int, ...], dtypes: Dtypes, mode: Mode, which: str) -> None:
    problem = make(shape, LAYOUT[layout], dtypes, mode, device=DEVICE)
    problem.dy = LAYOUT[layout].arrange(problem.dy)
    if which in ("x", "both"):
        problem.x = misaligned(problem.x)
    if which in ("dy", "both"):
        problem.dy = misaligned(problem.dy)
    check(problem)


CHANNELS = 64
ROWS = 2**31 // CHANNELS + 33
CHUNK_ROWS = 2**20
TENSORS = 4  # x, dy, y, dx, all alive at once


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows after the other, in float64."""
    for begin in range(0, len(tensors[0]), CHUNK_ROWS):
        yield tuple(tensor[begin : begin + CHUNK_ROWS].double() for tensor in tensors)


def free_bytes() -> int:
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def huge(rows: int, seed: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.empty(rows, CHANNELS, dtype=torch.bfloat16, device=DEVICE)
    for begin in range(0, rows, CHUNK_ROWS):
        part = x[begin : begin + CHUNK_ROWS]
        part.copy_(torch.randn(part.shape, generator=generator, device=DEVICE).add_(0.5))
    return x


@pytest.mark.parametrize("rows", [ROWS])
def test_more_elements_than_32_bits_count(rows: int) -> None:
    """Statistics and sums of all rows; y and dx of the first rows and of the last, beyond the limit."""
    needed = (TENSORS * 2 + 1) * rows * CHANNELS  # bytes, and room for chunks in float64
    if free_bytes() < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of the GPU's memory")
    x, dy = huge(rows, 1), huge(rows, 2)
    y, stats, _ = torch.ops.bnext.batch_norm(x, *[None] * 6, True, 0.1, 1e-5, True, [], None, None, False)
    mean = sum(part.sum(0) for (part,) in chunks(x)) / rows
    var = sum((part - mean).square().sum(0) for (part,) in chunks(x)) / rows
    invstd = (var + 1e-5).rsqrt()

    # With momentum 1 the bounds of the running statistics are those of the batch's own.
    means, variances, zero = numpy(mean), numpy(var), np.zeros(CHANNELS)
    bound = tolerances.running_mean(means, zero, means, variances, 1.0, torch.float64, x.dtype)
    tolerances.assert_within(stats[0], means, bound, "mean")
    bound = tolerances.running_var(variances, zero, variances, 1.0, torch.float64, x.dtype)
    tolerances.assert_within(stats[1].pow(-2) - 1e-5, variances, bound, "var")

    dx, dweight, dbias, _ = torch.ops.bnext.batch_norm_backward(
        dy, x, *[None] * 4, stats, True, None, None, False, [True, True, True, False]
    )
    sum_dy, sum_dy_xhat, sum_sizes = (torch.zeros_like(mean) for _ in range(3))
    for part, gradient in chunks(x, dy):
        xhat = (part - mean) * invstd
        sum_dy += gradient.sum(0)
        sum_dy_xhat += (gradient * xhat).sum(0)
        sum_sizes += (gradient.abs() * (xhat.abs() + 1)).sum(0)
    sums = tolerances.unit(torch.float32) * tolerances.CHAIN * numpy(sum_sizes)
    for name, got, expected in (("dweight", dweight, sum_dy_xhat), ("dbias", dbias, sum_dy)):
        exact = numpy(expected)
        tolerances.assert_within(got, exact, sums + tolerances.unit(got.dtype) * np.abs(exact), name)

    # 16-bit results: half a unit in the last place, and nothing beside it that shows.
    for rows_of in (slice(0, 64), slice(rows - 64, rows)):
        xhat = (x[rows_of].double() - mean) * invstd
        slope = (sum_dy + xhat * sum_dy_xhat) / rows
        for name, got, exact in (("y", y, xhat), ("dx", dx, invstd * (dy[rows_of].double() - slope))):
            expected = numpy(exact)
            bound = tolerances.unit(x.dtype) * np.abs(expected) + 1e-5
            tolerances.assert_within(got[rows_of], expected, bound, f"{name}[{rows_of.start}:]")
