"""The reference itself: the notebook's printed numbers, finite differences, torch in float64, and its own errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import notebook
from bnext import reference

Array = NDArray[np.float64]

# Any rank from two up; (1, 1, 2) is the smallest with a variance.
SHAPES = [(6, 3), (1, 1, 2), (4, 3, 5), (3, 4, 2, 5), (2, 3, 2, 3, 2), (2, 2, 1, 2, 3, 2)]
# Both sides are float64 and the problems are well conditioned (|values| <= 10): a hundred roundings of 1.1e-16 * 10.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def layer_for(shape: tuple[int, ...], random: np.random.Generator, training: bool) -> reference.BatchNorm:
    layer = reference.BatchNorm(shape[1])
    layer.gamma = random.normal(size=shape[1])
    layer.beta = random.normal(size=shape[1])
    layer.running_mean = random.normal(size=shape[1])
    layer.running_var = random.uniform(0.5, 2, size=shape[1])
    layer.training = training
    return layer


def slope(loss: Callable[[Array], float], at: Array) -> Array:
    """Central differences: error h^2/6 * f''' + 1e-16/h * f, least at h = 1e-5, about 1e-10 there."""
    h = 1e-5
    gradient = np.empty_like(at)
    for index in np.ndindex(at.shape):
        there, back = at.copy(), at.copy()
        there[index] += h
        back[index] -= h
        gradient[index] = (loss(there) - loss(back)) / (2 * h)
    return gradient


def test_prints_what_the_notebook_prints() -> None:
    data = notebook.data()
    layer = reference.BatchNorm(num_features=5)
    assert notebook.printed(layer.forward(data)) == notebook.TRAINING
    layer.training = False
    assert notebook.printed(layer.forward(data)).startswith(notebook.INFERENCE_BEGINNING)


def test_starts_as_the_notebook_does() -> None:
    layer = reference.BatchNorm(4, 0.8, 1e-3)
    np.testing.assert_array_equal([layer.gamma, layer.running_var], np.ones((2, 4)))
    np.testing.assert_array_equal([layer.beta, layer.running_mean], np.zeros((2, 4)))
    assert (layer.momentum, layer.epsilon, layer.training) == (0.8, 1e-3, True)
    default = reference.BatchNorm(4)
    assert (default.momentum, default.epsilon) == (0.9, 1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_the_slope_of_forward(
    shape: tuple[int, ...], training: bool, random: np.random.Generator
) -> None:
    x, dy = random.normal(size=shape), random.normal(size=shape)
    layer = layer_for(shape, random, training)

    def loss(**changed: Array) -> float:
        other = reference.BatchNorm(shape[1])
        other.gamma, other.beta = changed.get("gamma", layer.gamma), changed.get("beta", layer.beta)
        other.running_mean, other.running_var = running
        other.training = training
        return float((other.forward(changed.get("x", x)) * dy).sum())

    running = layer.running_mean.copy(), layer.running_var.copy()
    layer.forward(x)
    dx = layer.backward(dy)
    assert layer.dgamma is not None and layer.dbeta is not None
    # 1e-10 from the differences themselves, times the curvature at small variances, which h^2 sees.
    near = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(dx, slope(lambda value: loss(x=value), x), **near)
    np.testing.assert_allclose(layer.dgamma, slope(lambda value: loss(gamma=value), layer.gamma), **near)
    np.testing.assert_allclose(layer.dbeta, slope(lambda value: loss(beta=value), layer.beta), **near)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_functions_agree_with_torch(
    shape: tuple[int, ...], affine: bool, training: bool, random: np.random.Generator
) -> None:
    x, dy = random.normal(size=shape), random.normal(size=shape)
    layer = layer_for(shape, random, training)
    weight, bias = (layer.gamma, layer.beta) if affine else (None, None)
    tensors = [None if a is None else torch.from_numpy(a).requires_grad_() for a in (x, weight, bias)]
    running = [torch.from_numpy(a.copy()) for a in (layer.running_mean, layer.running_var)]
    y = torch.nn.functional.batch_norm(tensors[0], *running, *tensors[1:], training, 0.3, 1e-5)
    y.backward(torch.from_numpy(dy))

    count = x.size // shape[1]
    statistics = reference.statistics(x) if training else (layer.running_mean, layer.running_var)
    np.testing.assert_allclose(reference.forward(x, weight, bias, *statistics, 1e-5), y.detach(), **CLOSE)
    gradients = reference.backward(dy, x, weight, *statistics, 1e-5, training)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        if tensor is not None:
            np.testing.assert_allclose(gradient, tensor.grad, **CLOSE)
    if training:
        updated = reference.running_update(layer.running_mean, layer.running_var, *statistics, count, 0.3)
        np.testing.assert_allclose(updated, torch.stack(running), **CLOSE)


def test_running_update_conventions() -> None:
    old, batch, nan = ([0.0], [1.0]), ([10.0], [6.0]), ([np.nan], [np.nan])
    update, equal = reference.running_update, np.testing.assert_array_equal
    equal(update(*old, *batch, 4, 0.25), ([2.5], [0.75 + 0.25 * 8]))
    equal(update(*old, *batch, 4, 0.25, unbiased=False), ([2.5], [0.75 + 0.25 * 6]))
    equal(update(*old, *nan, 4, 0.0), old, "momentum 0 ignores the batch")
    equal(update(*old, *nan, 0, 0.25), old, "an empty batch is ignored")


def test_backward_uses_what_forward_saw(random: np.random.Generator) -> None:
    x, dy = random.normal(size=(2, 5, 3))
    layer = layer_for(x.shape, random, training=True)
    before = x.copy()
    layer.forward(x)
    np.testing.assert_array_equal(x, before)
    expected = layer.backward(dy)
    x *= 2
    layer.gamma *= 3
    layer.running_mean += 1
    layer.training = False
    np.testing.assert_array_equal(layer.backward(dy), expected)


X, ZEROS, ONES = np.ones((2, 3)), np.zeros(3), np.ones(3)
ERRORS: dict[str, tuple[type[Exception], Callable[[], object]]] = {
    "expected 3 channels": (ValueError, lambda: reference.BatchNorm(3).forward(np.ones((2, 4)))),
    "expected at least 2D input": (ValueError, lambda: reference.BatchNorm(3).forward(ONES)),
    "empty channel": (ValueError, lambda: reference.BatchNorm(3).forward(np.ones((0, 3)))),
    "must be real": (TypeError, lambda: reference.BatchNorm(3).forward(X * 1j)),
    "needs a forward pass": (RuntimeError, lambda: reference.BatchNorm(3).backward(X)),
    "weight should have shape": (ValueError, lambda: reference.forward(X, [1], None, ZEROS, ONES, 0)),
    "gradient has shape": (ValueError, lambda: reference.backward(X, X[:1], None, ZEROS, ONES, 0, True)),
    "no unbiased variance": (ValueError, lambda: reference.running_update(ZEROS, ONES, ZEROS, ONES, 1, 0.1)),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text: str) -> None:
    error, call = ERRORS[text]
    with pytest.raises(error, match=text):
        call()


def test_a_failed_forward_changes_nothing(random: np.random.Generator) -> None:
    x, dy = random.normal(size=(2, 4, 3))
    layer = layer_for(x.shape, random, training=True)
    layer.forward(x)
    expected, running = layer.backward(dy), layer.running_mean.copy()
    with pytest.raises(ValueError, match="expected 3 channels"):
        layer.forward(np.ones((4, 2)))
    np.testing.assert_array_equal(layer.running_mean, running)
    np.testing.assert_array_equal(layer.backward(dy), expected)
