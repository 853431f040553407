"""The resident CUDA kernels run over an execution model on the CPU (see test_cuda_on_host): one launch each way.

Every call is whole, against the float64 reference, with guard zones around all buffers.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

import host_engine
from cases import (
    ACTIVE,
    BFLOAT16,
    EVAL,
    FLOAT32,
    FLOAT64,
    INVERTIBLE,
    KEPT_LAYOUTS,
    LAYOUT,
    MATRICES,
    PARAMETERS,
    SHAPE_OF_RANK,
    SIZES,
    TRAIN,
    VOLUMES,
    Active,
    Dtypes,
)
from host_calls import SHIFTS, SMALL, HostCall, Schedule
from host_checks import check
from problem import Problem, joined, make, make_active
from resident_cases import ALONE, CLUSTERS, IN_TURNS, SHARED, SHARING, every_kept, run_resident

LARGE_DEVICE = replace(
    ALONE,
    multiprocessors=132,
    block_threads=1024,
    l2=50 << 20,
    shared_memory=227 << 10,
    multiprocessor_memory=228 << 10,
    cluster_blocks=8,
    bulk_copies=True,
)
every_active = pytest.mark.parametrize("active", [*ACTIVE, None], ids=str)


@every_kept
def test_alone(dtypes: Dtypes) -> None:
    """Every layout kernels know, every parameter set, on and off the boundaries of vectors; sizes of all kinds."""
    calls = [
        HostCall(problem, ALONE, shifts=shifts, counter=3)
        for layout in KEPT_LAYOUTS
        for parameters in PARAMETERS
        for problem in [make(SHAPE_OF_RANK[layout.rank], layout, dtypes, TRAIN, parameters)]
        for shifts in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (1, 1, 1), (0, 0, 1))
    ]
    shapes = [(shape, name) for shape in SIZES for name in ("nchw", "nhwc")]
    shapes += [(shape, name) for shape in VOLUMES for name in ("ncdhw", "ndhwc")]
    shapes += [(shape, "nc") for shape in MATRICES]
    calls += [
        HostCall(make(shape, LAYOUT[name], dtypes, TRAIN), LARGE_DEVICE)
        for shape, name in shapes
        if torch.Size(shape).numel() <= 200_000
    ]
    run_resident(calls)


@pytest.mark.parametrize("schedule", [SHARING, IN_TURNS], ids=["sharing", "in turns"])
@every_kept
def test_blocks_that_wait_for_each_other(dtypes: Dtypes, schedule: Schedule) -> None:
    calls = [
        HostCall(problem, schedule, shifts=shifts, counter=3)
        for shape, name in SHARED
        for problem in [make(shape, LAYOUT[name], dtypes, TRAIN)]
        for shifts in ((0, 0, 0), (1, 0, 0), (1, 1, 1))
    ]
    for result in run_resident(calls):
        assert all(1 < waiting <= 2 * schedule.multiprocessors for waiting in result.waiting)


@every_active
@every_kept
def test_activation_and_residual(dtypes: Dtypes, active: Active | None) -> None:
    calls = []
    for schedule, shapes in ((ALONE, SMALL), (IN_TURNS, SHARED)):
        for shape, name in shapes:
            calls.append(HostCall(make_active(active, shape, LAYOUT[name], dtypes, TRAIN), schedule))
            problem = joined(active, shape, name, dtypes, TRAIN)
            calls += [
                HostCall(problem, schedule, shifts=shifts, residual_shifts=others)
                for shifts, others in (SHIFTS[0], SHIFTS[1], SHIFTS[5])
            ]
    run_resident(calls)


@pytest.mark.parametrize("active", INVERTIBLE, ids=str)
@every_kept
def test_in_place(dtypes: Dtypes, active: Active | None) -> None:
    """Blocks write where others of their group have read; the bits are those of y beside x."""
    calls = []
    for schedule, shapes in ((ALONE, SMALL), (IN_TURNS, SHARED), (CLUSTERS, SHARED)):
        for shape, name in shapes:
            problem = make_active(active, shape, LAYOUT[name], dtypes, TRAIN, inplace=True)
            beside = make_active(active, shape, LAYOUT[name], dtypes, TRAIN)
            for shifts in ((0, 0, 0), (1, 1, 1)):
                calls.append(HostCall(problem, schedule, shifts=shifts))
                calls.append(HostCall(beside, schedule, shifts=shifts, backward=False))
    results = run_resident(calls)
    for call, over, other in zip(calls[::2], results[::2], results[1::2], strict=True):
        assert torch.equal(over.y, other.y), (call.problem.x.shape, call.shifts, call.schedule)


@every_kept
def test_any_order_of_threads_and_blocks_gives_the_same_bits(dtypes: Dtypes) -> None:
    """Alone also with fewer blocks alive than there are."""
    orders = [("ascending", 0, 1), ("descending", 0, 4), ("random", 1, 2), ("random", 2, 50)]
    calls = []
    for schedule, shapes in ((ALONE, SMALL), (SHARING, SHARED), (IN_TURNS, SHARED), (CLUSTERS, SHARED)):
        schedules = [
            replace(schedule, order=order, seed=seed, resident_blocks=alive) for order, seed, alive in orders
        ]
        for shape, name in shapes:
            for problem in (
                make(shape, LAYOUT[name], dtypes, TRAIN),
                joined(Active("relu"), shape, name, dtypes, TRAIN),
            ):
                calls += [HostCall(problem, one) for one in schedules]
    bits = [result.bits() for result in run_resident(calls)]
    for i in range(0, len(calls), len(orders)):
        assert len(set(bits[i : i + len(orders)])) == 1, (calls[i].problem.x.shape, calls[i].schedule)


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None], ids=str)
@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics(momentum: float | None, unbiased: bool) -> None:
    """With momentum from the counter: every block reads it before it changes."""
    calls = []
    for schedule, shapes in ((ALONE, SMALL), (IN_TURNS, SHARED)):
        for shape, name in shapes:
            problem = make(shape, LAYOUT[name], BFLOAT16, TRAIN)
            problem.momentum, problem.unbiased = momentum, unbiased
            calls.append(HostCall(problem, schedule, counter=6))
    run_resident(calls)


def large_mean(name: str) -> Problem:
    problem = make((64, 32, 32, 32), LAYOUT[name], FLOAT32, TRAIN, ())
    generator = torch.Generator().manual_seed(0)
    problem.x = LAYOUT[name].arrange(torch.randn(problem.x.shape, generator=generator) + 1e5)
    return problem


@pytest.mark.parametrize("name", ["nchw", "nhwc"])
def test_a_large_mean_costs_no_digits(name: str) -> None:
    """As in test_cuda_on_host, with the same limit."""
    call = HostCall(large_mean(name), replace(LARGE_DEVICE, block_threads=64))
    (result,) = run_resident([call])
    x = call.problem.x.double()
    var, mean = torch.var_mean(x, (0, 2, 3), unbiased=False, keepdim=True)
    assert (result.y.double() - (x - mean) / (var + call.problem.eps).sqrt()).abs().max() <= 2e-6


def test_a_constant_gives_exactly_the_bias() -> None:
    for schedule, shapes in ((ALONE, SMALL), (SHARING, SHARED)):
        for shape, name in shapes:
            problem = make(shape, LAYOUT[name], FLOAT32, TRAIN)
            problem.x = LAYOUT[name].arrange(torch.full(shape, 1e7))
            (result,) = host_engine.run([HostCall(problem, schedule)])
            assert problem.bias is not None
            assert torch.equal(result.y, problem.bias.view(-1, *[1] * (len(shape) - 2)).expand(shape))


def test_what_is_not_finite_stays_in_its_channel() -> None:
    for shape, name in SHARED:
        problem, clean = (make(shape, LAYOUT[name], FLOAT32, TRAIN) for _ in range(2))
        problem.x[0, 1] = float("nan")
        dirty, expected = host_engine.run([HostCall(p, SHARING) for p in (problem, clean)])
        others = [c for c in range(shape[1]) if c != 1]
        assert dirty.y[:, 1].isnan().all()
        assert torch.equal(dirty.y[:, others], expected.y[:, others])
        assert dirty.dx is not None and expected.dx is not None
        assert torch.equal(dirty.dx[:, others], expected.dx[:, others])


def test_only_what_was_asked_for() -> None:
    """Without dx there is nothing to keep: such a backward streams, and is one launch too."""
    calls = [
        HostCall(make(shape, LAYOUT[name], FLOAT32, TRAIN), SHARING, wanted=wanted)
        for shape, name in SHARED
        for wanted in product((True, False), repeat=3)
        if any(wanted)
    ]
    run_resident(calls)


@pytest.mark.parametrize(
    "dtypes,shape,schedule,why",
    [
        (FLOAT64, (40, 5), ALONE, "float64 streams"),
        (FLOAT32, (40000, 64), IN_TURNS, "does not fit"),
        (FLOAT32, (4, 64, 125), ALONE, "wider than a block"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_cannot_be_resident_is_refused(
    dtypes: Dtypes, shape: tuple[int, ...], schedule: Schedule, why: str
) -> None:
    problem = make(shape, LAYOUT["nc" if len(shape) == 2 else "ncl"], dtypes, TRAIN)
    done, _ = host_engine.execute([HostCall(problem, schedule)], "plain")
    assert done.returncode != 0 and why in done.stderr


def test_other_passes_stream() -> None:
    for shape, name in SMALL:
        call = HostCall(make(shape, LAYOUT[name], FLOAT32, EVAL), ALONE)
        (result,) = host_engine.run([call])
        check(call, result)
        assert result.launches == [1, 1] and result.waiting == [0, 0]
