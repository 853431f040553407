"""Activations in the CUDA kernels, compiled for the CPU and run over an execution model (see test_cuda_on_host).

Every call is whole: forward, statistics, backward, with outputs that begin as NaN and guard zones around all buffers.
"""

from __future__ import annotations

import pytest
import torch

import host_engine
from cases import (
    ACTIVE,
    BFLOAT16,
    BFLOAT16_WITH_FLOAT32,
    DTYPES,
    EVAL,
    FLOAT32,
    FLOAT64,
    KEPT_LAYOUTS,
    LAYOUT,
    MODES,
    PARAMETERS,
    SHAPE_OF_RANK,
    TRAIN,
    Active,
    Dtypes,
    Mode,
)
from host_calls import SMALL, HostCall, Schedule
from host_checks import check, run_and_check
from problem import make_active

# Selections, an elementary function, a parameter.
KINDS = [Active("relu"), Active("relu6"), Active("gelu"), Active("elu", 0.5)]
every_active = pytest.mark.parametrize("active", ACTIVE, ids=str)
every_kind = pytest.mark.parametrize("active", KINDS, ids=str)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)


@every_active
@pytest.mark.parametrize("mode", MODES, ids=str)
@every_dtype
def test_against_the_reference(dtypes: Dtypes, mode: Mode, active: Active) -> None:
    """Every kernel, every layout, on and off the boundaries of vectors."""
    calls = [HostCall(make_active(active, shape, LAYOUT[name], dtypes, mode)) for shape, name in SMALL]
    calls += [
        HostCall(problem, shifts=shifts)
        for layout in KEPT_LAYOUTS
        for problem in [make_active(active, SHAPE_OF_RANK[layout.rank], layout, dtypes, mode)]
        for shifts in ((0, 0, 0), (1, 0, 1))
    ]
    run_and_check(calls)


@every_kind
@pytest.mark.parametrize("mode", MODES, ids=str)
@every_dtype
def test_every_parameter_set(dtypes: Dtypes, mode: Mode, active: Active) -> None:
    run_and_check(
        [
            HostCall(make_active(active, shape, LAYOUT[name], dtypes, mode, parameters))
            for shape, name in SMALL
            for parameters in PARAMETERS
        ]
    )


@every_kind
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
def test_only_what_was_asked_for(mode: Mode, active: Active) -> None:
    wishes = [
        (dx, dweight, dbias) for dx in (True, False) for dweight in (True, False) for dbias in (True, False)
    ]
    calls = [
        HostCall(make_active(active, shape, LAYOUT[name], FLOAT32, mode), wanted=wanted)
        for shape, name in SMALL
        for wanted in wishes
    ]
    for call, result in zip(calls, host_engine.run(calls), strict=True):
        check(call, result)
        if not any(call.wanted):
            assert result.launches[1] == 0


@every_kind
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16, FLOAT64], ids=str)
@pytest.mark.parametrize(
    ("shape", "name"), [((300, 2, 5, 5), "nchw"), ((4, 33, 17, 31), "nhwc"), ((4000, 3), "nc")], ids=str
)
def test_larger_shapes(shape: tuple[int, ...], name: str, dtypes: Dtypes, active: Active) -> None:
    """Cut as a small device would, and as a large one."""
    problem = make_active(active, shape, LAYOUT[name], dtypes, TRAIN)
    schedules = (Schedule(), Schedule(multiprocessors=132, block_threads=1024, l2=50 << 20))
    run_and_check([HostCall(problem, schedule) for schedule in schedules])


@every_kind
@every_dtype
def test_any_order_of_threads_and_blocks_gives_the_same_bits(dtypes: Dtypes, active: Active) -> None:
    for shape, name in SMALL:
        problem = make_active(active, shape, LAYOUT[name], dtypes, TRAIN)
        schedules = [Schedule("ascending"), Schedule("descending"), Schedule("random", 1, 3)]
        results = host_engine.run([HostCall(problem, schedule) for schedule in schedules])
        assert len({result.bits() for result in results}) == 1, (shape, name)


@every_kind
def test_as_many_launches_as_without(active: Active) -> None:
    for shape, name in SMALL:
        for mode in MODES:
            call = HostCall(make_active(active, shape, LAYOUT[name], FLOAT32, mode), counter=5)
            (result,) = host_engine.run([call])
            check(call, result)
            assert result.launches == ([2, 2] if mode.batch else [1, 1])


@every_kind
def test_what_is_not_finite(active: Active) -> None:
    """In eval each element stands for itself: y is torch's, the others keep their bits."""
    for shape, name in SMALL:
        clean, dirty = (make_active(active, shape, LAYOUT[name], FLOAT32, EVAL) for _ in range(2))
        special = torch.tensor([float("nan"), float("inf"), -float("inf")])
        dirty.x[0, :3] = special[: dirty.x[0, :3].shape[0]].view(-1, *[1] * (len(shape) - 2))
        changed = ~dirty.x.isfinite()
        got, expected = host_engine.run([HostCall(p, backward=False) for p in (dirty, clean)])
        assert torch.equal(got.y[~changed], expected.y[~changed])
        z = torch.nn.functional.batch_norm(
            dirty.x, dirty.running_mean, dirty.running_var, dirty.weight, dirty.bias
        )
        torch.testing.assert_close(got.y[changed], active.of(z)[changed], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("engine", ["streaming", "resident"])
@every_active
def test_lanes_without_an_element_add_nothing(active: Active, engine: str) -> None:
    """Not even where a zero for x would be so far from the mean that its z, and so the slope, is not finite."""
    calls = []
    for dtypes, value in ((BFLOAT16_WITH_FLOAT32, 3e38), (FLOAT32, 1e37)):
        for shape, name in SMALL:
            problem = make_active(active, shape, LAYOUT[name], dtypes, TRAIN)
            problem.running_mean = problem.running_var = None
            problem.x = LAYOUT[name].arrange(torch.full(shape, value, dtype=dtypes.input))
            problem.weight = problem.weight * 2 + 6 * problem.weight.sign()
            problem.__post_init__()
            calls.append(HostCall(problem, Schedule(engine=engine)))
    for call, result in zip(calls, host_engine.run(calls), strict=True):
        for name in ("y", "dx", "dweight", "dbias"):
            assert getattr(result, name).isfinite().all(), (call.problem, name)
        check(call, result)


@pytest.mark.parametrize("variant", ["address", "thread"])
@every_kind
def test_sanitizers_find_nothing(active: Active, variant: str) -> None:
    """As in test_cuda_on_host_faults."""
    schedule = Schedule("random", seed=5, resident_blocks=3)
    small = SMALL if variant == "address" else SMALL[:1] + SMALL[2:5]
    run_and_check(
        [
            HostCall(make_active(active, shape, LAYOUT[name], dtypes, mode), schedule)
            for shape, name in small
            for dtypes in (FLOAT32, BFLOAT16)
            for mode in ((TRAIN, EVAL) if variant == "address" else (TRAIN,))
        ],
        variant,
    )
