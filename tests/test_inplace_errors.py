"""What a call that writes over its input refuses, before anything is touched, and what its neighbours refuse later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bnext.functional import batch_norm
from cases import EVAL, FLOAT32, LAYOUT, TRAIN, Mode
from inplace_inputs import leaf, values
from problem import make_active

HINT = "expected activation None, leaky_relu or elu, with a positive parameter, but got "
# An input, arguments, and what is said.
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Tensor], dict[str, Any]]] = {
    "leaf": (RuntimeError, "a leaf Variable that requires grad", leaf, {}),
    "view of a leaf": (RuntimeError, "a view of a leaf Variable that requires grad", lambda: leaf()[1:], {}),
    "part of a split": (
        RuntimeError,
        "output of a function that returns multiple views",
        lambda: values().unbind(0)[0][None],
        {},
    ),
    "expanded": (RuntimeError, "more than one element", lambda: values()[:1].expand(4, 3, 5), {}),
    "relu": (ValueError, HINT + r"relu \(what relu sets to 0 is lost", values, {"activation": "relu"}),
    "silu": (ValueError, HINT + "silu$", values, {"activation": "silu"}),
    "slope 0": (
        ValueError,
        HINT + "leaky_relu with 0.0",
        values,
        {"activation": "leaky_relu", "activation_param": 0.0},
    ),
    "slope -1": (
        ValueError,
        HINT + "leaky_relu with -1.0",
        values,
        {"activation": "leaky_relu", "activation_param": -1.0},
    ),
    "alpha 0": (ValueError, HINT + "elu with 0.0", values, {"activation": "elu", "activation_param": 0.0}),
    "residual": (ValueError, "inplace=True without a residual", values, {"residual": torch.ones(4, 3, 5)}),
    "weight 0": (RuntimeError, "weight", values, {"weight": torch.tensor([1.0, 0.0, 2.0])}),
    "weight -0": (RuntimeError, "weight", values, {"weight": torch.tensor([1.0, -0.0, 2.0])}),
    "integer": (NotImplementedError, "not implemented for 'Long'", lambda: torch.ones(4, 3, 5).long(), {}),
    "one value": (ValueError, "Expected more than 1 value", lambda: values()[:1, :, :1], {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    """Before anything is touched."""
    error, text, make, options = REFUSED[case]
    x, mean, var, counter = make(), torch.zeros(3), torch.ones(3), torch.tensor(5)
    before, version = x.detach().clone(), x._version
    with pytest.raises(error, match=text):
        batch_norm(x, mean, var, training=True, num_batches_tracked=counter, inplace=True, **options)
    assert torch.equal(x.detach(), before) and x._version == version
    assert not mean.any() and torch.equal(var, torch.ones(3)) and counter == 5


@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@pytest.mark.parametrize("asking", ["x", "weight", "bias"])
def test_a_weight_of_zero(asking: str, mode: Mode) -> None:
    """Nothing of x is left then. Refused if a gradient may be asked for, and only then."""
    problem = make_active(None, (4, 3), LAYOUT["nc"], FLOAT32, mode, inplace=True)
    problem.weight[1] = 0.0
    y = problem.forward()
    problem.check_output(y)
    assert torch.equal(y[:, 1], problem.bias[1].expand(4))
    problem.require_grad(asking)
    with torch.no_grad():
        problem.forward()
    with pytest.raises(RuntimeError, match="weight"):
        problem.forward()


def test_an_earlier_operation_that_kept_x() -> None:
    x = leaf().sigmoid()
    batch_norm(x, None, None, training=True, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_written_to_afterwards() -> None:
    """y is needed; in a network, the layer that follows in place would write over it."""
    for write in (lambda t: t.mul_(2), lambda t: t.detach().zero_(), lambda t: t[0].add_(1)):
        y = batch_norm(values(), None, None, training=True, inplace=True)
        write(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    y = batch_norm(values(), None, None, training=True, inplace=True)
    y = batch_norm(y, None, None, training=True, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
