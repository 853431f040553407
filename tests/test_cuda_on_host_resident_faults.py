"""The resident CUDA kernels over the execution model under sanitizers: silent as they are; planted faults are reported."""

from __future__ import annotations

from dataclasses import replace

import pytest

import host_engine
from cases import BFLOAT16, FLOAT16, FLOAT32, LAYOUT, TRAIN, Active, Dtypes
from host_engine import SMALL, Fault, HostCall, Schedule, check
from problem import make, make_active
from test_cuda_on_host_resident import ALONE, IN_TURNS, SHARED, SHARING, joined, run

# ThreadSanitizer tells some 250 threads apart, and blocks that wait are all alive: four of 64 threads, in turns.
FEW = replace(IN_TURNS, multiprocessors=2)
FEW_SHARED = [((300, 5), "nc"), ((24, 72), "nc"), ((3, 3, 17, 71), "nchw"), ((12, 33, 3, 3), "nchw")]
FEW_MEMORY = replace(FEW, shared_memory=9 << 10, multiprocessor_memory=20 << 10)


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_sanitizers_find_nothing(variant: str, dtypes: Dtypes) -> None:
    alone = replace(ALONE, order="random", seed=5, resident_blocks=3)
    sharing = replace(IN_TURNS if variant == "address" else FEW_MEMORY, order="random", seed=5)
    calls = []
    for schedule, shapes in ((alone, SMALL), (sharing, SHARED if variant == "address" else FEW_SHARED)):
        for shape, name in shapes:
            for shift in (0, 1):
                problems = [
                    make(shape, LAYOUT[name], dtypes, TRAIN),
                    joined(Active("relu"), shape, name, dtypes, TRAIN),
                    joined(Active("gelu"), shape, name, dtypes, TRAIN),
                    make_active(Active("elu"), shape, LAYOUT[name], dtypes, TRAIN, inplace=True),
                ]
                calls += [HostCall(p, schedule, shifts=(shift, shift, shift), counter=1) for p in problems]
    run(calls, variant)


def report(
    fault: Fault, variant: str, shape: tuple[int, ...], name: str, schedule: Schedule = FEW_MEMORY
) -> str:
    call = HostCall(make(shape, LAYOUT[name], FLOAT32, TRAIN), schedule, fault)
    done, _ = host_engine.execute([call], variant)
    assert done.returncode != 0, "the fault went unseen"
    return done.stderr


@pytest.mark.parametrize("shape,name", FEW_SHARED, ids=str)
def test_a_missing_group_barrier_is_a_data_race(shape: tuple[int, ...], name: str) -> None:
    assert "data race" in report(Fault(skip_group_barrier=True), "thread", shape, name)


@pytest.mark.parametrize(
    "barrier,shape,name",
    [(barrier, *FEW_SHARED[0]) for barrier in range(4)] + [(barrier, *FEW_SHARED[2]) for barrier in range(3)],
    ids=str,
)
def test_a_missing_block_barrier_is_a_data_race(barrier: int, shape: tuple[int, ...], name: str) -> None:
    assert "data race" in report(Fault(skip_barrier=barrier), "thread", shape, name)


@pytest.mark.parametrize("shape,name", [SMALL[1], SMALL[4], *SHARED[3:6:2]], ids=str)
def test_an_early_read_of_a_copy_is_found(shape: tuple[int, ...], name: str) -> None:
    """By AddressSanitizer on the spot; without it, by results that are wrong and by copies nobody waited for."""
    fault = Fault(skip_async_wait=True)
    assert "poison" in report(fault, "address", shape, name, SHARING)
    assert "copies under way" in report(fault, "plain", shape, name, SHARING)


@pytest.mark.parametrize("shape,name", [*SMALL, *FEW_SHARED], ids=str)
def test_a_store_past_the_end_is_found(shape: tuple[int, ...], name: str) -> None:
    assert "poison" in report(Fault(displace_stores=16), "address", shape, name, SHARING)
    assert "guard zone" in report(Fault(displace_stores=16), "plain", shape, name, SHARING)


def test_a_launch_that_the_device_does_not_hold_fails() -> None:
    """What plans ask for it holds: all calls of these tests ran."""
    call = HostCall(make((300, 5), LAYOUT["nc"], FLOAT32, TRAIN), FEW_MEMORY)
    (result,) = host_engine.run([call])
    check(call, result)
    assert max(result.waiting) <= 4
