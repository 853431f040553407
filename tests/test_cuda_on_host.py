"""The CUDA kernels, compiled for the CPU and run over an execution model, against the float64 reference.

Every call is whole: forward, statistics, backward, with outputs that begin as NaN and guard zones around all buffers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import host_engine
from cases import (
    BFLOAT16,
    BFLOAT16_WITH_FLOAT32,
    DTYPES,
    FLOAT16,
    FLOAT16_WITH_FLOAT32,
    FLOAT32,
    FLOAT64,
    KEPT_LAYOUTS,
    LAYOUT,
    MATRICES,
    MODES,
    PARAMETERS,
    SHAPE_OF_RANK,
    SIZES,
    TRAIN,
    VOLUMES,
    Dtypes,
    Mode,
)
from host_calls import SMALL, HostCall, Schedule
from host_checks import check, run_and_check
from outliers import LONG, MISLED, looked_at
from problem import make

# What the larger shapes below need to be cut as they would be on a real device.
LARGE_DEVICE = Schedule(multiprocessors=132, block_threads=1024, l2=50 << 20)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_matrix(dtypes: Dtypes, mode: Mode) -> None:
    """Every layout kernels know, every parameter set, on and off the boundaries of vectors."""
    run_and_check(
        [
            HostCall(problem, shifts=shifts)
            for layout in KEPT_LAYOUTS
            for parameters in PARAMETERS
            for problem in [make(SHAPE_OF_RANK[layout.rank], layout, dtypes, mode, parameters)]
            for shifts in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (1, 1, 1), (0, 0, 1))
        ]
    )


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16, FLOAT64], ids=str)
def test_sizes(dtypes: Dtypes) -> None:
    shapes = [(shape, name) for shape in SIZES for name in ("nchw", "nhwc")]
    shapes += [(shape, name) for shape in VOLUMES for name in ("ncdhw", "ndhwc")]
    shapes += [(shape, "nc") for shape in MATRICES]
    run_and_check(
        [
            HostCall(problem, schedule)
            for shape, name in shapes
            if torch.Size(shape).numel() <= 200_000
            for problem in [make(shape, LAYOUT[name], dtypes, TRAIN)]
            for schedule in (Schedule(), Schedule(block_threads=96, multiprocessors=7))
        ]
    )


@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize(
    "shape", [(100_003, 3), (2, 65_536), (1, 7, 1, 5), (1, 1, 1, 2), (300, 2, 5, 5), (1, 1, 50_021)], ids=str
)
def test_extremes(shape: tuple[int, ...], dtypes: Dtypes) -> None:
    """As a large device would cut them: blocks of all the threads that kernels are made for."""
    names = {2: ["nc"], 3: ["ncl"], 4: ["nchw", "nhwc"]}[len(shape)]
    run_and_check([HostCall(make(shape, LAYOUT[name], dtypes, TRAIN), LARGE_DEVICE) for name in names])


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(dtypes: Dtypes) -> None:
    for shape, name in SMALL:
        problem = make(shape, LAYOUT[name], dtypes, TRAIN)
        schedules = [
            Schedule("ascending"),
            Schedule("descending"),
            *(Schedule("random", seed, resident) for seed, resident in ((1, 1), (2, 3), (3, 50))),
        ]
        results = host_engine.run([HostCall(problem, schedule) for schedule in schedules])
        assert len({result.bits() for result in results}) == 1, (shape, name)


@pytest.mark.parametrize("shape,name", SMALL, ids=str)
def test_at_most_two_launches_each_way(shape: tuple[int, ...], name: str) -> None:
    for mode in MODES:
        call = HostCall(make(shape, LAYOUT[name], FLOAT32, mode), counter=5)
        (result,) = host_engine.run([call])
        check(call, result)
        assert result.launches == ([2, 2] if mode.batch else [1, 1])


def test_only_what_was_asked_for() -> None:
    calls = [
        HostCall(make(shape, LAYOUT[name], FLOAT32, mode), wanted=(dx, dweight, dbias))
        for shape, name in SMALL
        for mode in MODES
        for dx in (True, False)
        for dweight in (True, False)
        for dbias in (True, False)
    ]
    results = host_engine.run(calls)
    for call, result in zip(calls, results, strict=True):
        check(call, result)
        if not any(call.wanted):
            assert result.launches[1] == 0


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None], ids=str)
@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics(momentum: float | None, unbiased: bool) -> None:
    calls = []
    for shape, name in SMALL:
        problem = make(shape, LAYOUT[name], BFLOAT16, TRAIN)
        problem.momentum, problem.unbiased = momentum, unbiased
        calls.append(HostCall(problem, counter=6))
    run_and_check(calls)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    """The batch counts; running statistics stay; gradients of the parameters are zero."""
    call = HostCall(make(shape, LAYOUT["nc" if len(shape) == 2 else "nchw"], FLOAT32, TRAIN), counter=0)
    (result,) = host_engine.run([call])
    assert result.counter == 1
    assert result.running_mean is not None and torch.equal(result.running_mean, call.problem.running_mean)
    assert result.dweight is not None and not result.dweight.any()
    assert result.dbias is not None and not result.dbias.any()


def test_every_16_bit_value() -> None:
    """Mean 0, variance 1, eps 0 and no bias: y is x * weight rounded once, as torch's cast rounds it."""
    for dtypes in (BFLOAT16, FLOAT16):
        for shape, name in (((2**15, 2), "nc"), ((64, 2, 16, 32), "nchw")):
            problem = make(shape, LAYOUT[name], dtypes, MODES[1], ("weight",))
            values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtypes.input)
            problem.x = values.view(shape)
            problem.eps = 0.0
            assert problem.running_mean is not None and problem.running_var is not None
            problem.running_mean.zero_()
            problem.running_var.fill_(1)
            assert problem.weight is not None
            (result,) = host_engine.run([HostCall(problem, backward=False)])
            weight = problem.weight.float().view(-1, *[1] * (len(shape) - 2))
            expected = (problem.x.float() * weight).to(dtypes.input)
            assert torch.equal(result.y.isnan(), problem.x.isnan())
            assert torch.equal(result.y.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("name", ["nchw", "nhwc"])
def test_a_large_mean_costs_no_digits(name: str) -> None:
    """float32, mean 1e5, standard deviation 1: y within 2e-6, dweight within 1e-2."""
    problem = make((64, 32, 32, 32), LAYOUT[name], FLOAT32, MODES[2], ())
    generator = torch.Generator().manual_seed(0)
    problem.x = LAYOUT[name].arrange(torch.randn(problem.x.shape, generator=generator) + 1e5)
    call = HostCall(problem, LARGE_DEVICE)
    (result,) = host_engine.run([call])
    check(call, result)
    x = problem.x.double()
    var, mean = torch.var_mean(x, (0, 2, 3), unbiased=False, keepdim=True)
    xhat = (x - mean) / (var + problem.eps).sqrt()
    assert (result.y.double() - xhat).abs().max() <= 2e-6
    assert result.dweight is not None
    assert (result.dweight.double() - (problem.dy.double() * xhat).sum((0, 2, 3))).abs().max() <= 1e-2


@pytest.mark.parametrize("shape,name", SMALL, ids=str)
def test_a_constant_gives_exactly_the_bias(shape: tuple[int, ...], name: str) -> None:
    problem = make(shape, LAYOUT[name], FLOAT32, TRAIN)
    problem.x = LAYOUT[name].arrange(torch.full(shape, 1e7))
    (result,) = host_engine.run([HostCall(problem)])
    assert problem.bias is not None
    assert torch.equal(result.y, problem.bias.view(-1, *[1] * (len(shape) - 2)).expand(shape))


@pytest.mark.parametrize("where", ["first", "second", "last"])
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64], ids=str)
def test_one_outlier_spoils_nothing(dtypes: Dtypes, where: str) -> None:
    """Wherever it stands: one element that is tens of standard deviations off does not become the center."""
    calls = []
    for shape, name in (((4000, 5), "nc"), ((4, 3, 33, 31), "nchw"), ((40, 6, 7, 7), "nchw")):
        problem = make(shape, LAYOUT[name], dtypes, TRAIN)
        flat = problem.x.view(shape[0], shape[1], -1)
        second = (0, 1) if flat.shape[2] > 1 else (1, 0)
        outer, inner = {"first": (0, 0), "second": second, "last": (-1, -1)}[where]
        flat[outer, :, inner] = 1e3
        calls.append(HostCall(problem))
    run_and_check(calls)


# Where streaming and resident kernels cut what they walk in whole vectors, and where not.
@pytest.mark.parametrize("engine", ["streaming", "resident"])
@pytest.mark.parametrize("outlier", [1e3, 3e4])
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32, FLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("layout", LONG)
def test_outliers_where_the_center_is_looked_for(
    layout: str, dtypes: Dtypes, outlier: float, engine: str
) -> None:
    """One that is tens of standard deviations off is the center, or many are: it costs no digits."""
    shape, calls = LONG[layout], []
    for where in ((0,), MISLED):
        problem = make(shape, LAYOUT[layout], dtypes, TRAIN)
        for sample in where:
            n, *space = looked_at(shape, layout, sample) if len(where) > 1 else (0,) * (len(shape) - 1)
            problem.x[(n, 0, *space)] = outlier
        schedule = replace(
            LARGE_DEVICE, engine=engine, shared_memory=200 << 10, multiprocessor_memory=228 << 10
        )
        calls += [HostCall(problem, schedule, shifts=shifts) for shifts in ((0, 0, 0), (1, 1, 1))]
    run_and_check(calls)


@pytest.mark.parametrize("special", [1e2, 1e4])
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("name", ["nchw", "nhwc"])
def test_special_corners_do_not_become_the_center(name: str, dtypes: Dtypes, special: float) -> None:
    """Images whose corners are all alike, far from everything else: the samples for the center must not be those."""
    shape = (16, 2, 64, 64)
    problem = make(shape, LAYOUT[name], dtypes, TRAIN)
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + 1e-3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        x[:, :, corner[0], corner[1]] = special
    problem.x = LAYOUT[name].arrange(x.to(dtypes.input))
    run_and_check([HostCall(problem, LARGE_DEVICE)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_in_its_channel(value: float) -> None:
    for shape, name in SMALL:
        problem = make(shape, LAYOUT[name], FLOAT32, TRAIN)
        clean = make(shape, LAYOUT[name], FLOAT32, TRAIN)
        problem.x[0, 1] = value
        dirty, expected = host_engine.run([HostCall(problem), HostCall(clean)])
        others = [c for c in range(shape[1]) if c != 1]
        assert dirty.y[:, 1].isnan().all()
        assert torch.equal(dirty.y[:, others], expected.y[:, others])
        assert dirty.dx is not None and expected.dx is not None
        assert torch.equal(dirty.dx[:, others], expected.dx[:, others])
