"""The CPU kernels in a program of their own: no race for ThreadSanitizer to find, no byte outside of a tensor touched.

Tensors lie against pages that cannot be touched, and plans are for machines of every kind, so that small tensors are
cut, and stored past the cache, as large ones are.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from dataclasses import replace
from subprocess import CompletedProcess

import pytest

import host_engine
import on_host
from cases import (
    ACTIVE,
    BFLOAT16,
    DTYPES,
    EVAL,
    FLOAT32,
    INVERTIBLE,
    LAYOUT,
    MODES,
    TRAIN,
    UNTRACKED,
    Active,
    Dtypes,
)
from host_calls import SMALL as ODD
from host_calls import Fault, HostCall, Result
from host_checks import check, run_and_check
from problem import joined, make, make_active
from processors import MACHINES, RUNNABLE, SMALL

MASKED = [Active("relu"), Active("leaky_relu", 0.25), Active("relu6")]
KINDS = [*MASKED, Active("gelu"), None]

# Shared out over threads: rows of whole vectors and odd ones, short, joined and wide, planes of whole cache lines and
# odd ones, short planes, few channels, one.
SHARED = [
    ((110, 32, 5, 5), "nhwc"),
    ((270, 33, 3, 3), "nchw"),
    ((16_001, 5), "nc"),
    ((20, 4096), "nc"),
    ((6, 40, 12, 16), "nchw"),
    ((9, 31, 11, 13), "nchw"),
    ((300, 4, 8, 8), "nchw"),
    ((2, 3, 113, 120), "nchw"),
    ((1, 1, 70_021), "ncl"),
]

every_set = pytest.mark.parametrize("instruction_set", RUNNABLE)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)

VARIANT = "thread" if on_host.unavailable("thread") is None else "plain"


def run(calls: list[HostCall], instruction_set: str = RUNNABLE[0]) -> list[Result]:
    return host_engine.run(calls, VARIANT, host_engine.cpu(instruction_set))


def fault(call: HostCall, variant: str, instruction_set: str = RUNNABLE[0]) -> CompletedProcess[str]:
    """What comes of a call with one."""
    done, _ = host_engine.execute([call], variant, host_engine.cpu(instruction_set))
    assert done.returncode != 0, "the fault went unseen"
    return done


def kinds(shape: tuple[int, ...], name: str, dtypes: Dtypes) -> Iterator[HostCall]:
    """A call of every kernel for these tensors."""
    for mode in MODES:
        yield HostCall(make(shape, LAYOUT[name], dtypes, mode), counter=1)
    yield HostCall(make(shape, LAYOUT[name], dtypes, UNTRACKED), phases=True)
    yield HostCall(make(shape, LAYOUT[name], dtypes, TRAIN), wanted=(False, True, True))
    yield HostCall(make(shape, LAYOUT[name], dtypes, EVAL), wanted=(True, False, False))
    for active in KINDS:
        for mode in (TRAIN, EVAL):
            yield HostCall(joined(active, shape, name, dtypes, mode))
    for active in MASKED:
        yield HostCall(make_active(active, shape, LAYOUT[name], dtypes, TRAIN))
        frozen = make_active(active, shape, LAYOUT[name], dtypes, EVAL)
        yield HostCall(frozen, keeps_input=False, wanted=(True, False, False), spoils_input=True)
    for invertible in INVERTIBLE:
        yield HostCall(make_active(invertible, shape, LAYOUT[name], dtypes, TRAIN, inplace=True))


# Each tensor against the page before it, against the one behind, and off a boundary.
PLACES = [("first", 0), ("last", 0), ("first", 1)]


def placed(call: HostCall, place: str, shift: int) -> HostCall:
    return replace(call, place=place, shifts=(shift, 0, shift), residual_shifts=(shift, 0))


@every_set
@every_dtype
def test_odd_sizes(dtypes: Dtypes, instruction_set: str) -> None:
    """Every kernel."""
    calls = [
        placed(call, *place) for shape, name in ODD for call in kinds(shape, name, dtypes) for place in PLACES
    ]
    run_and_check(calls, VARIANT, host_engine.cpu(instruction_set))


@every_set
def test_every_activation(instruction_set: str) -> None:
    for dtypes in (FLOAT32, BFLOAT16):
        problems = [
            make_active(active, shape, LAYOUT[name], dtypes, mode)
            for shape, name in ODD[1:5]
            for active in ACTIVE
            for mode in (TRAIN, EVAL)
        ]
        calls = [HostCall(problem, place="last") for problem in problems]
        run_and_check(calls, VARIANT, host_engine.cpu(instruction_set))


@pytest.mark.parametrize(
    "instruction_set,shape,name",
    [(each, *case) for k, each in enumerate(RUNNABLE) for case in (SHARED[:5:4] if k else SHARED)],
    ids=str,
)
def test_shared_out(shape: tuple[int, ...], name: str, instruction_set: str) -> None:
    """Whatever the machine, the bits are the same."""
    places = itertools.cycle(PLACES)
    calls = [placed(call, *next(places)) for call in kinds(shape, name, FLOAT32)]
    results = [
        run([replace(call, processor=machine) for call in calls], instruction_set) for machine in MACHINES
    ]
    for call, *of_call in zip(calls, *results, strict=True):
        check(call, of_call[0])
        assert len({result.bits() for result in of_call}) == 1, call.problem


def test_plans_differ() -> None:
    """Among the calls above is every schedule; in training each is cut in more than one way."""
    schedules, streamed = set(), {}
    for shape, name in SHARED:
        for mode in (TRAIN, EVAL):
            problem = make(shape, LAYOUT[name], FLOAT32, mode)
            took = [r.took[0] for r in run([HostCall(problem, processor=machine) for machine in MACHINES])]
            assert mode is EVAL or len(set(map(tuple, took))) > 1, shape
            schedules |= {schedule for schedule, _, _, _ in took}
            streamed[shape, mode] = [streaming for _, _, _, streaming in took]
    assert schedules == {0, 1, 2}
    assert streamed[(6, 40, 12, 16), EVAL] == [0, 1, 0, 1] and not any(streamed[(9, 31, 11, 13), TRAIN])


@pytest.mark.parametrize("shape,name", SHARED, ids=str)
def test_ranges_that_overlap_are_a_data_race(shape: tuple[int, ...], name: str) -> None:
    call = HostCall(make(shape, LAYOUT[name], FLOAT32, TRAIN), fault=Fault(overlap=1), processor=SMALL)
    assert "data race" in fault(call, "thread").stderr


@every_set
@pytest.mark.parametrize("shape,name", ODD, ids=str)
def test_a_read_past_the_end_is_found(shape: tuple[int, ...], name: str, instruction_set: str) -> None:
    """As if x had one element less."""
    for dtypes in (FLOAT32, BFLOAT16):
        problem = make(shape, LAYOUT[name], dtypes, TRAIN)
        lacking = Fault(lacking=problem.x.element_size())
        done = fault(HostCall(problem, fault=lacking, place="last"), VARIANT, instruction_set)
        assert "SEGV" in done.stderr or done.returncode == -signal.SIGSEGV
