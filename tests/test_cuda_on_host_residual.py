"""Residual, mask and in-place in the CUDA kernels, run over an execution model on the CPU (see test_cuda_on_host).

Every call is whole: forward, statistics, backward, with outputs that begin as NaN, a mask that begins as ones, and
guard zones around all buffers.
"""

from __future__ import annotations

import pytest
import torch

import host_engine
from cases import (
    ACTIVE,
    BFLOAT16,
    DTYPES,
    EVAL,
    FLOAT32,
    FLOAT64,
    INVERTIBLE,
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
from host_calls import SHIFTS, SMALL, Fault, HostCall, Schedule
from host_checks import run_and_check
from problem import Problem, joined, make_active

# By a mask, by a mask with two thresholds, with the residual once more, without either.
KINDS = [Active("relu"), Active("leaky_relu"), Active("relu6"), Active("gelu"), None]
MASKED = KINDS[:3]
every_kind = pytest.mark.parametrize("active", KINDS, ids=str)
every_masked = pytest.mark.parametrize("active", MASKED, ids=str)
every_invertible = pytest.mark.parametrize("active", INVERTIBLE, ids=str)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def in_place(active: Active | None, shape: tuple[int, ...], name: str, dtypes: Dtypes, mode: Mode) -> Problem:
    return make_active(active, shape, LAYOUT[name], dtypes, mode, inplace=True)


@pytest.mark.parametrize("active", [*ACTIVE, None], ids=str)
@every_mode
@every_dtype
def test_against_the_reference(dtypes: Dtypes, mode: Mode, active: Active | None) -> None:
    """Every kernel, every layout, on and off the boundaries of vectors."""
    calls = [HostCall(joined(active, shape, name, dtypes, mode)) for shape, name in SMALL]
    calls += [
        HostCall(problem, shifts=shifts, residual_shifts=others)
        for layout in KEPT_LAYOUTS
        for problem in [joined(active, SHAPE_OF_RANK[layout.rank], layout, dtypes, mode)]
        for shifts, others in (SHIFTS if active in KINDS else SHIFTS[:2])
    ]
    run_and_check(calls)


@every_kind
@every_dtype
def test_off_boundaries(dtypes: Dtypes, active: Active | None) -> None:
    """Whole vectors that begin anywhere, and bytes of the mask that vectors share."""
    run_and_check(
        [
            HostCall(problem, shifts=shifts, residual_shifts=others)
            for shape, name in SMALL
            for mode in (TRAIN, EVAL)
            for problem in [joined(active, shape, name, dtypes, mode)]
            for shifts, others in SHIFTS[1:]
        ]
    )


@every_kind
@every_mode
def test_every_parameter_set(mode: Mode, active: Active | None) -> None:
    run_and_check(
        [
            HostCall(joined(active, shape, name, dtypes, mode, parameters))
            for dtypes in (FLOAT32, BFLOAT16)
            for shape, name in SMALL
            for parameters in PARAMETERS
        ]
    )


@every_kind
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16, FLOAT64], ids=str)
@pytest.mark.parametrize(
    ("shape", "name"), [((300, 2, 5, 5), "nchw"), ((4, 33, 17, 31), "nhwc"), ((4000, 3), "nc")], ids=str
)
def test_larger_shapes(shape: tuple[int, ...], name: str, dtypes: Dtypes, active: Active | None) -> None:
    """Cut as a small device would, and as a large one."""
    schedules = (Schedule(), Schedule(multiprocessors=132, block_threads=1024, l2=50 << 20))
    problems = [joined(active, shape, name, dtypes, mode) for mode in (TRAIN, EVAL)]
    run_and_check([HostCall(p, schedule) for p in problems for schedule in schedules])


@every_masked
@every_dtype
def test_mask_and_residual_tell_the_same(dtypes: Dtypes, active: Active) -> None:
    """What the mask lets through is what is found again from x and the residual, bit for bit."""
    problems = [joined(active, shape, name, dtypes, TRAIN) for shape, name in SMALL]
    with_mask = run_and_check([HostCall(p) for p in problems])
    without = run_and_check([HostCall(p, mask=False) for p in problems])
    for one, two in zip(with_mask, without, strict=True):
        assert one.dresidual is not None and two.dresidual is not None
        assert torch.equal(one.dresidual, two.dresidual) and torch.equal(one.y, two.y)


@every_kind
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
def test_only_what_was_asked_for(mode: Mode, active: Active | None) -> None:
    """With fixed statistics in one kernel, whatever it is."""
    wishes = [(x, weight, bias) for x in (True, False) for weight in (True, False) for bias in (True, False)]
    calls = [
        HostCall(joined(active, shape, name, FLOAT32, mode), wanted=wanted)
        for shape, name in SMALL
        for wanted in wishes
    ]
    for call, result in zip(calls, run_and_check(calls), strict=True):
        dx = call.wanted[0]
        kernels = 1 + (dx and mode.batch) if any(call.wanted) else 0
        assert result.launches == [1 + mode.batch, kernels]


@every_kind
@every_dtype
def test_any_order_of_threads_and_blocks_gives_the_same_bits(dtypes: Dtypes, active: Active | None) -> None:
    schedules = [Schedule("ascending"), Schedule("descending"), Schedule("random", 1, 3)]
    for shape, name in SMALL:
        for mode in (TRAIN, EVAL):
            for shifts in ((0, 0, 0), (0, 0, 1)):
                problem = joined(active, shape, name, dtypes, mode)
                results = host_engine.run([HostCall(problem, s, shifts=shifts) for s in schedules])
                assert len({result.bits() for result in results}) == 1, (shape, name)


@every_kind
def test_what_is_not_finite(active: Active | None) -> None:
    """In eval each element stands for itself: y and dresidual are torch's, the others keep their bits."""
    for shape, name in SMALL:
        clean, dirty = (joined(active, shape, name, FLOAT32, EVAL) for _ in range(2))
        assert dirty.residual is not None
        special = torch.tensor([float("nan"), float("inf"), -float("inf")])
        dirty.residual[0, :3] = special[: dirty.x[0, :3].shape[0]].view(-1, *[1] * (len(shape) - 2))
        changed = ~dirty.residual.isfinite()
        got, expected = host_engine.run([HostCall(p) for p in (dirty, clean)])
        assert torch.equal(got.y[~changed], expected.y[~changed])
        statistics = (dirty.running_mean, dirty.running_var, dirty.weight, dirty.bias)
        z = (torch.nn.functional.batch_norm(dirty.x, *statistics) + dirty.residual).detach().requires_grad_()
        y = z if active is None else active.of(z)
        torch.testing.assert_close(got.y[changed], y[changed], rtol=0, atol=0, equal_nan=True)
        above = active == Active("relu6")
        if active in MASKED:
            y.backward(dirty.dy)
            assert got.dresidual is not None and z.grad is not None
            # torch's relu6 has another gradient at NaN, dy or 0, from its scalar and its vector code (activation.h).
            expected_grad = torch.where(z.isnan(), dirty.dy, z.grad) if above else z.grad
            assert torch.equal(got.dresidual[changed], expected_grad[changed])


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0, 4)], ids=str)
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16], ids=str)
def test_empty(dtypes: Dtypes, shape: tuple[int, ...]) -> None:
    name = "nc" if len(shape) == 2 else "nchw"
    (result,) = host_engine.run([HostCall(joined(MASKED[0], shape, name, dtypes, TRAIN))])
    assert result.mask is not None and not result.mask.any()


@every_invertible
@every_mode
@every_dtype
def test_in_place(dtypes: Dtypes, mode: Mode, active: Active | None) -> None:
    """y over x has the bits that y beside x has; backward goes by y alone, whatever the order of threads."""
    shapes = [*SMALL, *((SHAPE_OF_RANK[layout.rank], layout.name) for layout in KEPT_LAYOUTS)]
    calls = []
    for shape, name in shapes:
        problem = in_place(active, shape, name, dtypes, mode)
        beside = make_active(active, shape, LAYOUT[name], dtypes, mode)
        for shifts in ((0, 0, 0), (1, 0, 0), (1, 1, 2)):
            schedules = (Schedule(), Schedule("random", 2, 3))
            calls += [HostCall(problem, schedule, shifts=shifts) for schedule in schedules]
            calls.append(HostCall(beside, shifts=shifts, backward=False))
    results = run_and_check(calls)
    for call, first, second, other in zip(
        calls[::3], results[::3], results[1::3], results[2::3], strict=True
    ):
        case = call.problem.x.shape, call.shifts
        assert first.bits() == second.bits(), case
        assert torch.equal(first.y, other.y), case
        assert first.launches == ([2, 2] if mode.batch else [1, 1]), case


@every_invertible
@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
def test_a_weight_of_zero_in_place_is_seen(mode: Mode, active: Active | None) -> None:
    """x is lost: its gradient is zero all the same, that of the weight is not known."""
    problems = [in_place(active, shape, name, FLOAT32, mode) for shape, name in SMALL]
    for problem in problems:
        assert problem.weight is not None
        problem.weight[1] = 0
    for problem, result in zip(problems, host_engine.run(list(map(HostCall, problems))), strict=True):
        assert result.dx is not None and result.dweight is not None and result.dbias is not None
        assert not result.dx[:, 1].any() and result.dx[:, 0].any()
        assert result.dweight.isnan().tolist() == [c == 1 for c in range(problem.x.shape[1])]
        problem.check_bias_grad(result.dbias)


@pytest.mark.parametrize("variant", ["address", "thread"])
@pytest.mark.parametrize("active", [*KINDS, "in place"], ids=str)
def test_sanitizers_find_nothing(active: Active | str | None, variant: str) -> None:
    """As in test_cuda_on_host_faults; off boundaries vectors share bytes of the mask."""
    schedule = Schedule("random", seed=5, resident_blocks=3)
    small = SMALL if variant == "address" else SMALL[:1] + SMALL[2:5]
    problems = [
        in_place(Active("elu"), shape, name, dtypes, mode)
        if isinstance(active, str)
        else joined(active, shape, name, dtypes, mode)
        for shape, name in small
        for dtypes in (FLOAT32, BFLOAT16)
        for mode in (TRAIN, EVAL)
    ]
    run_and_check(
        [HostCall(p, schedule, shifts=shifts) for p in problems for shifts in ((0, 0, 0), (0, 0, 1))], variant
    )


@pytest.mark.parametrize("shape,name", [SMALL[0], SMALL[3]], ids=["rows", "planes"])
def test_bits_that_are_not_set_atomically_are_a_data_race(shape: tuple[int, ...], name: str) -> None:
    call = HostCall(
        joined(MASKED[0], shape, name, FLOAT32, TRAIN), Schedule(resident_blocks=3), Fault(tear_atomics=True)
    )
    done, _ = host_engine.execute([call], "thread")
    assert done.returncode != 0 and "data race" in done.stderr


@pytest.mark.parametrize("shape,name", SMALL, ids=str)
def test_a_store_past_the_end_is_found(shape: tuple[int, ...], name: str) -> None:
    call = HostCall(joined(MASKED[0], shape, name, FLOAT32, TRAIN), fault=Fault(displace_stores=16))
    assert "guard zone" in host_engine.execute([call], "plain")[0].stderr
