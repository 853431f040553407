"""The resident CUDA kernels over the execution model under sanitizers: silent; planted faults are reported."""

from __future__ import annotations

from dataclasses import replace

import pytest

import host_engine
from cases import BFLOAT16, FLOAT16, FLOAT32, LAYOUT, TRAIN, Active, Dtypes
from host_calls import SMALL, Fault, HostCall, Schedule
from problem import joined, make, make_active
from resident_cases import ALONE, IN_TURNS, SHARED, SHARING, run_resident

FEW = replace(IN_TURNS, multiprocessors=2)


def few(kilobytes: int) -> Schedule:
    """ThreadSanitizer tells some 250 threads apart, and blocks that wait are all alive: at most four of 64 threads."""
    return replace(FEW, shared_memory=kilobytes << 10, multiprocessor_memory=2 * (kilobytes + 1) << 10)


def clustered(schedule: Schedule) -> Schedule:
    """One cluster at a time."""
    return replace(schedule, cluster_blocks=8, resident_blocks=1)


# Blocks of so much memory share a slab, in turns: with four bytes to an element, with two.
Shared = tuple[tuple[int, ...], str, Schedule]
FEW_SHARED: dict[int, list[Shared]] = {
    4: [
        ((300, 5), "nc", few(9)),
        ((60, 72), "nc", few(11)),
        ((3, 3, 17, 71), "nchw", few(14)),
        ((40, 33, 3, 3), "nchw", few(9)),
    ],
    2: [
        ((300, 5), "nc", few(9)),
        ((24, 72), "nc", few(13)),
        ((3, 3, 17, 71), "nchw", few(9)),
        ((20, 33, 3, 3), "nchw", few(9)),
    ],
}
# Planes and joined rows that are copied in bulk, by blocks that take turns.
FEW_IN_BULK: list[Shared] = [
    ((4, 6, 16, 32), "nchw", replace(few(11), bulk_copies=True)),
    ((256, 16), "nc", replace(few(15), bulk_copies=True)),
]
every_shared = pytest.mark.parametrize("shape,name,schedule", FEW_SHARED[4], ids=lambda v: str(v)[:20])


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_sanitizers_find_nothing(variant: str, dtypes: Dtypes) -> None:
    cases: list[Shared] = [(*case, replace(ALONE, resident_blocks=3)) for case in SMALL]
    if variant == "address":
        cases += [(*case, IN_TURNS) for case in SHARED]
        cases += [(*case, replace(IN_TURNS, cluster_blocks=8, bulk_copies=True)) for case in SHARED]
    else:
        cases += FEW_SHARED[dtypes.input.itemsize]
        cases += [(*case[:2], clustered(case[2])) for case in FEW_SHARED[dtypes.input.itemsize]]
    cases += FEW_IN_BULK
    calls = []
    for shape, name, schedule in cases:
        schedule = replace(schedule, order="random", seed=5)
        problems = [
            make(shape, LAYOUT[name], dtypes, TRAIN),
            joined(Active("relu"), shape, name, dtypes, TRAIN),
            joined(Active("gelu"), shape, name, dtypes, TRAIN),
            make_active(Active("elu"), shape, LAYOUT[name], dtypes, TRAIN, inplace=True),
        ]
        shifts = ((0, 0, 0), (1, 1, 1))
        calls += [HostCall(p, schedule, shifts=shift, counter=1) for p in problems for shift in shifts]
    results = run_resident(calls, variant)
    assert any(max(result.waiting) > 1 for result in results)
    assert any(max(result.cluster) > 1 for result in results)
    assert any(max(result.bulk) for result in results)


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


@every_shared
@pytest.mark.parametrize("wait", [0, 1], ids=["to read", "to end"])
def test_a_missing_wait_for_the_cluster_is_a_data_race(
    wait: int, shape: tuple[int, ...], name: str, schedule: Schedule
) -> None:
    assert "data race" in report(Fault(unordered_wait=wait), "thread", shape, name, clustered(schedule))


@pytest.mark.parametrize("barrier", [0, 5], ids=["first", "at the end of a turn"])
def test_bulk_copies_too_early_are_a_data_race(barrier: int) -> None:
    """Before their barriers are seen, and over what others still read."""
    assert "data race" in report(Fault(skip_barrier=barrier), "thread", *FEW_IN_BULK[0])


@pytest.mark.parametrize(
    "barrier,case",
    [(barrier, FEW_SHARED[4][0]) for barrier in range(4)]
    + [(barrier, FEW_SHARED[4][2]) for barrier in (0, 1)],
    ids=lambda v: str(v)[:20],
)
def test_a_missing_block_barrier_is_a_data_race(barrier: int, case: Shared) -> None:
    assert "data race" in report(Fault(skip_barrier=barrier), "thread", *case)


@pytest.mark.parametrize(
    "shape,name,schedule",
    [*((*case, SHARING) for case in [SMALL[1], SMALL[4], *SHARED[3:6:2]]), *FEW_IN_BULK],
    ids=lambda v: str(v)[:20],
)
def test_an_early_read_of_a_copy_is_found(shape: tuple[int, ...], name: str, schedule: Schedule) -> None:
    """By AddressSanitizer on the spot; without it, by results that are wrong and by copies nobody waited for."""
    fault = Fault(skip_async_wait=True)
    assert "poison" in report(fault, "address", shape, name, schedule)
    assert "copies under way" in report(fault, "plain", shape, name, schedule)


@pytest.mark.parametrize("shape,name", [*SMALL, *SHARED], ids=str)
def test_a_store_past_the_end_is_found(shape: tuple[int, ...], name: str) -> None:
    assert "poison" in report(Fault(displace_stores=16), "address", shape, name, SHARING)
    assert "guard zone" in report(Fault(displace_stores=16), "plain", shape, name, SHARING)
