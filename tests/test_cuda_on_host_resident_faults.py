"""The resident CUDA kernels over the execution model under sanitizers: silent; planted faults are reported."""

from __future__ import annotations

from dataclasses import replace

import pytest

import host_engine
from cases import BFLOAT16, FLOAT16, FLOAT32, LAYOUT, TRAIN, Active, Dtypes
from host_engine import SMALL, Fault, HostCall, Schedule
from problem import make, make_active
from test_cuda_on_host_resident import ALONE, IN_TURNS, SHARED, SHARING, joined, run

FEW = replace(IN_TURNS, multiprocessors=2)


def few(kilobytes: int) -> Schedule:
    """ThreadSanitizer tells some 250 threads apart, and blocks that wait are all alive: at most four of 64 threads."""
    return replace(FEW, shared_memory=kilobytes << 10, multiprocessor_memory=2 * (kilobytes + 1) << 10)


# Blocks of so much memory share a slab, in turns: with four bytes to an element, with two.
Shared = tuple[tuple[int, ...], str, Schedule]
FEW_SHARED: dict[int, list[Shared]] = {
    4: [
        ((300, 5), "nc", few(9)),
        ((60, 72), "nc", few(11)),
        ((3, 3, 17, 71), "nchw", few(13)),
        ((40, 33, 3, 3), "nchw", few(9)),
    ],
    2: [
        ((300, 5), "nc", few(9)),
        ((24, 72), "nc", few(11)),
        ((3, 3, 17, 71), "nchw", few(9)),
        ((20, 33, 3, 3), "nchw", few(9)),
    ],
}
every_shared = pytest.mark.parametrize("shape,name,schedule", FEW_SHARED[4], ids=lambda v: str(v)[:20])


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_sanitizers_find_nothing(variant: str, dtypes: Dtypes) -> None:
    cases: list[Shared] = [(*case, replace(ALONE, resident_blocks=3)) for case in SMALL]
    if variant == "address":
        cases += [(*case, IN_TURNS) for case in SHARED]
    else:
        cases += FEW_SHARED[dtypes.input.itemsize]
    calls = []
    for shape, name, schedule in cases:
        schedule = replace(schedule, order="random", seed=5)
        for shift in (0, 1):
            problems = [
                make(shape, LAYOUT[name], dtypes, TRAIN),
                joined(Active("relu"), shape, name, dtypes, TRAIN),
                joined(Active("gelu"), shape, name, dtypes, TRAIN),
                make_active(Active("elu"), shape, LAYOUT[name], dtypes, TRAIN, inplace=True),
            ]
            calls += [HostCall(p, schedule, shifts=(shift, shift, shift), counter=1) for p in problems]
    results = run(calls, variant)
    assert any(max(result.waiting) > 1 for result in results)


def report(fault: Fault, variant: str, shape: tuple[int, ...], name: str, schedule: Schedule) -> str:
    call = HostCall(make(shape, LAYOUT[name], FLOAT32, TRAIN), schedule, fault)
    done, _ = host_engine.execute([call], variant)
    assert done.returncode != 0, "the fault went unseen"
    return done.stderr


@every_shared
def test_a_missing_group_barrier_is_a_data_race(
    shape: tuple[int, ...], name: str, schedule: Schedule
) -> None:
    assert "data race" in report(Fault(skip_group_barrier=True), "thread", shape, name, schedule)


@pytest.mark.parametrize(
    "barrier,case",
    [(barrier, FEW_SHARED[4][0]) for barrier in range(4)]
    + [(barrier, FEW_SHARED[4][2]) for barrier in (0, 1)],
    ids=lambda v: str(v)[:20],
)
def test_a_missing_block_barrier_is_a_data_race(barrier: int, case: Shared) -> None:
    assert "data race" in report(Fault(skip_barrier=barrier), "thread", *case)


@pytest.mark.parametrize("shape,name", [SMALL[1], SMALL[4], *SHARED[3:6:2]], ids=str)
def test_an_early_read_of_a_copy_is_found(shape: tuple[int, ...], name: str) -> None:
    """By AddressSanitizer on the spot; without it, by results that are wrong and by copies nobody waited for."""
    fault = Fault(skip_async_wait=True)
    assert "poison" in report(fault, "address", shape, name, SHARING)
    assert "copies under way" in report(fault, "plain", shape, name, SHARING)


@pytest.mark.parametrize("shape,name", [*SMALL, *SHARED], ids=str)
def test_a_store_past_the_end_is_found(shape: tuple[int, ...], name: str) -> None:
    assert "poison" in report(Fault(displace_stores=16), "address", shape, name, SHARING)
    assert "guard zone" in report(Fault(displace_stores=16), "plain", shape, name, SHARING)
