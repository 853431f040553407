"""The CUDA kernels over the execution model under sanitizers: silent as they are; planted faults are reported."""

from __future__ import annotations

import pytest

import host_engine
from cases import DTYPES, FLOAT32, LAYOUT, MODES, TRAIN, Dtypes
from host_calls import SMALL, Fault, HostCall, Schedule
from host_checks import run_and_check
from problem import make


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_sanitizers_find_nothing(variant: str, dtypes: Dtypes) -> None:
    """ThreadSanitizer tells some 250 threads apart: three blocks of 64."""
    schedule = Schedule("random", seed=5, resident_blocks=3)
    small = SMALL if variant == "address" else SMALL[:1] + SMALL[2:5]
    modes = MODES if variant == "address" else [TRAIN]
    shifts = [(0, 0, 0), (1, 0, 1)] if variant == "address" else [(0, 0, 0)]
    run_and_check(
        [
            HostCall(make(shape, LAYOUT[name], dtypes, mode), schedule, shifts=shift, counter=1)
            for shape, name in small
            for mode in modes
            for shift in shifts
        ],
        variant,
    )


def report(fault: Fault, variant: str, shape: tuple[int, ...], name: str) -> str:
    """What a sanitizer says of the fault."""
    call = HostCall(make(shape, LAYOUT[name], FLOAT32, TRAIN), Schedule(resident_blocks=3), fault)
    done, _ = host_engine.execute([call], variant)
    assert done.returncode != 0, "the fault went unseen"
    return done.stderr


@pytest.mark.parametrize(
    "barrier,shape,name",
    [(barrier, *SMALL[0]) for barrier in range(4)] + [(0, *SMALL[3])],
    ids=lambda value: str(value),
)
def test_a_missing_block_barrier_is_a_data_race(barrier: int, shape: tuple[int, ...], name: str) -> None:
    assert "data race" in report(Fault(skip_barrier=barrier), "thread", shape, name)


@pytest.mark.parametrize("shape,name", [((400, 5), "nc"), ((9, 3, 17, 31), "nchw")], ids=["rows", "planes"])
def test_a_missing_dependency_between_blocks_is_a_data_race(shape: tuple[int, ...], name: str) -> None:
    assert "data race" in report(Fault(early_arrival=True), "thread", shape, name)


@pytest.mark.parametrize("shape,name", [((400, 5), "nc"), ((9, 3, 17, 31), "nchw")], ids=["rows", "planes"])
def test_a_map_that_does_not_wait_for_its_reduce_is_a_data_race(shape: tuple[int, ...], name: str) -> None:
    assert "data race" in report(Fault(skip_previous=True), "thread", shape, name)
    call = HostCall(
        make(shape, LAYOUT[name], FLOAT32, TRAIN), Schedule(early_launches=False), Fault(skip_previous=True)
    )
    host_engine.run([call], "thread")  # it begins when the reduce has ended


@pytest.mark.parametrize("shape,name", SMALL, ids=str)
def test_a_store_past_the_end_is_found(shape: tuple[int, ...], name: str) -> None:
    """By AddressSanitizer on the spot; without it, by the guard zones."""
    assert "poison" in report(Fault(displace_stores=16), "address", shape, name)
    assert "guard zone" in report(Fault(displace_stores=16), "plain", shape, name)
