"""What is asked of an engine that runs outside of torch: nearness to the float64 reference, every bit of a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from host_calls import HostCall, Result
from host_engine import CUDA, Engine, run


def check_mask(call: HostCall, result: Result) -> None:
    """Every bit, and zeros behind them."""
    if not call.masked:
        assert result.mask is None
        return
    problem, y = call.problem, result.y
    passes = result.passes()
    z, error = problem.affine
    above = problem.activation == "relu6"
    known = np.minimum(np.abs(z), np.abs(z - 6) if above else np.inf) > error
    assert known.mean() > 0.99
    np.testing.assert_array_equal(passes.numpy()[known], ((z > 0) & ((z < 6) | (not above)))[known])
    if not above or y.element_size() > 2:  # what is selected keeps its bits, so that y tells of every element
        assert torch.equal(passes, (y > 0) & ((y < 6) | (not above)))
    assert result.mask is not None
    rest = np.unpackbits(result.mask.numpy(), bitorder="little")[y.numel() :]
    assert not rest.any()


def check(call: HostCall, result: Result) -> None:
    """Everything against the float64 reference, and the mask."""
    p = call.problem
    p.check_output(result.y)
    for kept, given, absent in zip(result.stats[2:], (p.weight, p.bias), (1, 0), strict=False):
        whole = torch.full_like(kept, absent) if given is None else given.double()
        assert p.x.numel() == 0 or torch.equal(kept, whole)
    if result.running_mean is not None and p.batch:
        assert p.running_mean is not None and p.running_var is not None and result.running_var is not None
        before = p.running_mean, p.running_var
        p.running_mean, p.running_var = result.running_mean, result.running_var
        momentum = 1 / ((call.counter or 0) + 1) if p.momentum is None else p.momentum
        p.check_running(momentum)
        p.running_mean, p.running_var = before
    if result.counter is not None:
        assert call.counter is not None and result.counter == call.counter + int(p.batch)
    for grad, judge in (
        (result.dx, p.check_input_grad),
        (result.dweight, p.check_weight_grad),
        (result.dbias, p.check_bias_grad),
        (result.dresidual, p.check_residual_grad),
    ):
        if grad is not None:
            judge(grad)
    check_mask(call, result)


def run_and_check(calls: Sequence[HostCall], variant: str = "plain", engine: Engine = CUDA) -> list[Result]:
    results = run(calls, variant, engine)
    for call, result in zip(calls, results, strict=True):
        check(call, result)
    return results
