"""The reference of activations itself: torch in float64, finite differences, the places where derivatives jump."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bnext import functional, reference, reference_activations
from cases import ACTIVE, Active, arguments_of

Array = NDArray[np.float64]

# Every piece of every activation, far into both ends, and no kink.
Z = np.concatenate((np.linspace(-7.03, 7.04, 202), [-800.0, -40.0, -1e-9, 1e-9, 40.0, 800.0]))
# Two float64 computations; torch's may cancel a value of one down to nothing.
CLOSE = {"rtol": 1e-13, "atol": 1e-15}
every_active = pytest.mark.parametrize("active", ACTIVE, ids=str)


def both(z: Array, active: Active) -> tuple[Array, Array]:
    given = active.activation, active.activation_param
    return reference_activations.value(z, *given), reference_activations.slope(z, *given)


def torchs(z: Array, active: Active) -> tuple[Array, Array]:
    tensor = torch.from_numpy(z.copy()).requires_grad_()
    y = active.of(tensor)
    (slope,) = torch.autograd.grad(y.sum(), tensor)
    return y.detach().numpy(), slope.numpy()


@every_active
def test_as_torch(active: Active) -> None:
    for ours, theirs in zip(both(Z, active), torchs(Z, active), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


@every_active
def test_slope_is_the_slope_of_value(active: Active) -> None:
    """Central differences, as in test_reference."""
    h, z = 1e-5, Z[(np.abs(Z) > 1e-3) & (np.abs(Z) < 10)]
    above, below = (both(z + step, active)[0] for step in (h, -h))
    np.testing.assert_allclose(both(z, active)[1], (above - below) / (2 * h), rtol=1e-7, atol=1e-9)


@every_active
def test_at_kinks_as_torch(active: Active) -> None:
    kinks = np.array([0.0, -3.0, 3.0, 6.0])
    for ours, theirs in zip(both(kinks, active), torchs(kinks, active), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


@every_active
def test_not_finite_as_torch(active: Active) -> None:
    z = np.array([np.nan, np.inf, -np.inf])
    np.testing.assert_array_equal(both(z, active)[0], torchs(z, active)[0])


def test_the_same_names_as_the_layers() -> None:
    assert tuple(reference_activations.ACTIVATIONS) == functional.ACTIVATIONS
    with_default = [n for n, a in reference_activations.ACTIVATIONS.items() if a.default is not None]
    assert tuple(with_default) == functional.WITH_PARAMETER


def test_none_is_the_reference_without() -> None:
    x, dy = np.random.default_rng(1).normal(size=(2, 5, 3))
    vectors = np.random.default_rng(2).uniform(0.5, 2, size=(4, 3))
    weight, _, mean, var = vectors
    np.testing.assert_array_equal(
        reference_activations.forward(x, *vectors, 1e-5), reference.forward(x, *vectors, 1e-5)
    )
    for one, other in zip(
        reference_activations.backward(dy, x, *vectors, 1e-5, False),
        (*reference.backward(dy, x, weight, mean, var, 1e-5, False), dy),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("added", [False, True], ids=["bare", "residual"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("active", [None, *ACTIVE], ids=str)
def test_backward_is_the_slope_of_forward(active: Active | None, training: bool, added: bool) -> None:
    """Against torch's composition: the differences of test_reference would now and then cross a kink."""
    random = np.random.default_rng(3)
    x, dy, residual = random.normal(size=(3, 6, 3, 2))
    weight, bias, mean, var = random.uniform(0.5, 2, size=(4, 3))
    given = arguments_of(active)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, weight, bias, residual)]
    running = [torch.from_numpy(a.copy()) for a in (mean, var)]
    z = torch.nn.functional.batch_norm(tensors[0], *running, *tensors[1:3], training, 0.1, 1e-5)
    z = z + tensors[3] if added else z
    y = z if active is None else active.of(z)
    y.backward(torch.from_numpy(dy))
    vectors = (weight, bias, *(reference.statistics(x) if training else (mean, var)), 1e-5)
    last = (*given, residual if added else None)
    forward = reference_activations.forward(x, *vectors, *last)
    *gradients, dresidual = reference_activations.backward(dy, x, *vectors, training, *last)
    near = {"rtol": 1e-12, "atol": 1e-13}
    np.testing.assert_allclose(forward, y.detach(), **near)
    for gradient, tensor in zip(gradients, tensors[:3], strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, **near)
    if added:
        np.testing.assert_allclose(dresidual, tensors[3].grad, **near)


ERRORS: dict[str, Callable[[], object]] = {
    "residual has shape": lambda: reference_activations.forward(
        np.ones((2, 1)), None, None, [0], [1], 0, residual=[[1]]
    ),
    "no activation is called swish": lambda: reference_activations.value(Z, "swish"),
    "relu has no parameter": lambda: reference_activations.slope(Z, "relu", 0.1),
    "None has no parameter": lambda: reference_activations.parameter(None, 0.1),
    "gradient has shape": lambda: reference_activations.backward(
        Z[:4].reshape(4, 1), np.ones((2, 1)), None, None, [0], [1], 0, True, "relu"
    ),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ERRORS[text]()
