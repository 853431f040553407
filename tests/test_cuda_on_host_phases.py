"""The phases one by one in the CUDA kernels, run over an execution model on the CPU (see test_cuda_on_host).

Moments pass from a call without output to one with given statistics, sums from a call without dx to one that reduces
nothing.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import host_engine
from cases import DTYPES, KEPT_LAYOUTS, LAYOUT, SHAPE_OF_RANK, UNTRACKED, Active, Dtypes
from host_calls import SMALL, HostCall, Schedule
from host_checks import check, run_and_check
from problem import Problem, make_active

every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)


# The ways to find dz: none, by a mask, with one argument or two thresholds, computed again.
ACTIVES = [None, Active("relu"), Active("leaky_relu"), Active("relu6"), Active("gelu")]


def problems(active: Active | None, dtypes: Dtypes, with_residual: bool) -> list[Problem]:
    places = [*SMALL, *((SHAPE_OF_RANK[layout.rank], layout.name) for layout in KEPT_LAYOUTS)]
    return [
        make_active(
            active, shape, LAYOUT[name], dtypes, UNTRACKED, residual=LAYOUT[name] if with_residual else None
        )
        for shape, name in places
    ]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("active", ACTIVES, ids=str)
@every_dtype
def test_against_the_reference(dtypes: Dtypes, active: Active | None, with_residual: bool) -> None:
    calls = [
        HostCall(problem, schedule, shifts=shifts, phases=True)
        for problem in problems(active, dtypes, with_residual)
        for schedule, shifts in ((Schedule(), (1, 0, 1)), (Schedule(engine="automatic"), (0, 0, 0)))
    ]
    run_and_check(calls)


@pytest.mark.parametrize("active", [None, Active("relu"), Active("gelu")], ids=str)
@every_dtype
def test_the_same_numbers_as_in_one_call(dtypes: Dtypes, active: Active | None) -> None:
    """Sums and folds are the same code in the same order: the same bits."""
    wholes = [HostCall(problem) for problem in problems(active, dtypes, with_residual=False)]
    parts = [dataclasses.replace(call, phases=True) for call in wholes]
    for call, whole, part in zip(wholes, host_engine.run(wholes), host_engine.run(parts), strict=True):
        check(call, part)
        assert part.bits() == whole.bits()


@pytest.mark.parametrize("variant", ["address", "thread"])
@pytest.mark.parametrize("active", [None, Active("relu"), Active("silu")], ids=str)
def test_under_a_sanitizer(active: Active | None, variant: str) -> None:
    calls = [
        HostCall(problem, phases=True)
        for dtypes in (DTYPES[0], DTYPES[2])
        for with_residual in (False, True)
        for problem in problems(active, dtypes, with_residual)[:6]
    ]
    run_and_check(calls, variant)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 4)])
def test_an_empty_input_has_sums_of_zero(shape: tuple[int, ...]) -> None:
    problem = make_active(None, shape, LAYOUT["nchw"], DTYPES[0], UNTRACKED)
    (result,) = host_engine.run([HostCall(problem, phases=True)])
    assert result.dweight is None or torch.equal(result.dweight, torch.zeros(3))
