"""Sums of the CUDA kernels have the same bits wherever dz comes from, on either engine (see test_cuda_on_host).

On a GPU tests/test_activation.py asks the same of y and the gradients of a relu.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import host_engine
from cases import DTYPES, EVAL, LAYOUT, MODES, TRAIN, Active, Dtypes, Mode
from host_calls import SMALL, HostCall, Result, Schedule
from host_checks import run_and_check
from problem import joined, make_active
from resident_cases import ALONE, IN_TURNS, SHARED, every_kept

RELU = Active("relu")
# Beside SMALL: rows of several batches of whole vectors, of odd ones, with a row that is left over.
ROWS = [((300, 16), "nc"), ((60, 64, 3, 3), "nhwc"), ((6, 70, 9, 9), "nhwc"), ((41, 24, 3, 3), "nchw")]

every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def assert_same(one: Result, other: Result, names: tuple[str, ...], what: object) -> None:
    for name in names:
        first, second = getattr(one, name), getattr(other, name)
        assert isinstance(first, Tensor) and torch.equal(first, second), (name, what)


def check_relu(shape: tuple[int, ...], name: str, dtypes: Dtypes, mode: Mode, schedule: Schedule) -> None:
    """Behind one, gradients are those of the layer alone whose dy is zero where y is not positive."""
    fused, alone = (make_active(active, shape, LAYOUT[name], dtypes, mode) for active in (RELU, None))
    (first,) = host_engine.run([HostCall(fused, schedule)])
    alone.dy.masked_fill_(first.y <= 0, 0)
    (second,) = host_engine.run([HostCall(alone, schedule)])
    assert torch.equal(first.y, second.y.clamp(min=0)), (shape, name)
    assert_same(first, second, ("stats", "dx", "dweight", "dbias"), (shape, name))


@every_mode
@every_dtype
def test_a_relu_costs_no_bit(dtypes: Dtypes, mode: Mode) -> None:
    for shape, name in SMALL + ROWS:
        check_relu(shape, name, dtypes, mode, Schedule())


@every_kept
def test_a_relu_costs_no_bit_on_the_resident_engine(dtypes: Dtypes) -> None:
    for schedule, shapes in ((ALONE, SMALL + ROWS[:1]), (IN_TURNS, SHARED)):
        for shape, name in shapes:
            check_relu(shape, name, dtypes, TRAIN, schedule)


@every_mode
@pytest.mark.parametrize("active", [RELU, Active("leaky_relu", 0.25)], ids=str)
@every_dtype
def test_a_mask_costs_no_bit(dtypes: Dtypes, active: Active, mode: Mode) -> None:
    """It tells what x and the residual would. (A resident kernel cuts finer where it keeps the residual too.)"""
    for shape, name in SMALL + ROWS:
        problem = joined(active, shape, name, dtypes, mode)
        by_mask, found = host_engine.run([HostCall(problem, mask=mask) for mask in (True, False)])
        assert_same(by_mask, found, ("y", "stats", "dx", "dweight", "dbias", "dresidual"), (shape, name))


@every_mode
@pytest.mark.parametrize("active", [RELU, Active("leaky_relu", 0.25), Active("relu6")], ids=str)
@every_dtype
def test_a_mask_in_place_of_the_input_costs_no_bit(dtypes: Dtypes, active: Active, mode: Mode) -> None:
    """Without a residual; where statistics are fixed and the weight's gradient is not wanted nothing else reads x."""
    for shape, name in SMALL + ROWS:
        problem = make_active(active, shape, LAYOUT[name], dtypes, mode)
        for wanted, grads in (
            ((True, True, True), ("dx", "dweight", "dbias")),
            ((True, False, False), ("dx",)),
        ):
            gone = mode is EVAL and not wanted[1]
            by_mask, found = run_and_check(
                [
                    HostCall(problem, wanted=wanted, keeps_input=keeps, spoils_input=gone and not keeps)
                    for keeps in (False, True)
                ]
            )
            assert_same(by_mask, found, ("y", "stats", *grads), (shape, name))
