"""Arguments of a wrong type: what was given and what was expected, as TypeError like torch's; what stands for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnext
from bnext.functional import batch_norm

X = torch.arange(6.0).reshape(2, 3)


def call(**options: Any) -> Tensor:
    given = {"input": X.clone(), "running_mean": None, "running_var": None, "training": True}
    return batch_norm(**(given | options))


# A value that is none, what is expected, what was got.
CALLS: dict[str, tuple[Any, str, str]] = {
    "input": ([1.0], "a tensor", "list"),
    "running_mean": ([0.0, 0.0, 0.0], "a tensor or None", "list"),
    "running_var": (1.0, "a tensor or None", "float"),
    "weight": (np.ones(3, np.float32), "a tensor or None", "ndarray"),
    "bias": ("0", "a tensor or None", "str"),
    "num_batches_tracked": (0, "a tensor or None", "int"),
    "momentum": ("0.1", "a number or None", "'0.1'"),
    "eps": (None, "a number", "None"),
    "training": ("yes", "True or False", "'yes'"),
    "unbiased_running_var": ("no", "True or False", "'no'"),
    "skip_nonfinite": ("no", "True or False", "'no'"),
    "activation": (nn.ReLU, "a name or None", "<class"),
    "activation_param": ("0.1", "a number or None", "'0.1'"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_of_the_function(name: str, inplace: bool) -> None:
    value, expected, got = CALLS[name]
    with pytest.raises(TypeError, match=f"expected {name} as {expected}, but got {got}"):
        call(**{name: value}, inplace=inplace)


LAYER = bnext.BatchNorm1d
OTHERS: dict[str, tuple[Callable[[], object], str]] = {
    "activation as eps": (lambda: LAYER(3, "relu")(X), "eps as a number, but got 'relu'"),
    "activation": (lambda: LAYER(3, activation=nn.ReLU()), "activation as a name or None, but got ReLU"),
    "parameter": (lambda: LAYER(3, activation="elu", activation_param="1"), "activation_param as a number"),
    "unbiased": (lambda: LAYER(3, unbiased_running_var="no"), "unbiased_running_var as True or False"),
    "skip": (lambda: LAYER(3, skip_nonfinite=[]), "skip_nonfinite as True or False"),
    "freeze": (lambda: bnext.freeze(LAYER(3), "no"), "affine as True or False, but got 'no'"),
    "unfreeze": (lambda: bnext.unfreeze(LAYER(3), "no"), "affine as True or False, but got 'no'"),
    "convert": (lambda: bnext.convert(LAYER(3), subclasses="no"), "subclasses as True or False"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_of_layers_and_networks(name: str) -> None:
    run, expected = OTHERS[name]
    with pytest.raises(TypeError, match=f"expected {expected}"):
        run()


def test_nothing_is_counted() -> None:
    layer = LAYER(3)
    layer.momentum = "0.1"
    with pytest.raises(TypeError, match="momentum as a number or None"):
        layer(X)
    assert not layer.num_batches_tracked and not layer.running_mean.any()


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25)], ids=type)
def test_numbers_of_other_kinds(number: Any) -> None:
    expected = call(eps=0.25, activation="elu", activation_param=0.25)
    found = call(eps=number, activation="elu", activation_param=number, skip_nonfinite=np.True_)
    assert torch.equal(found, expected)
