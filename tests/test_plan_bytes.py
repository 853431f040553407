"""Bytes that plans count, with and without a residual: on the CPU and on a GPU that is described, the same table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bnext

SHAPE = (1 << 22, 1024)  # no cache holds it between two passes
WITHOUT_L2 = bnext.CudaDevice(multiprocessors=100, bandwidth=1e12, l2=0)
LARGE_L2 = bnext.CudaDevice(multiprocessors=100, bandwidth=1e12, l2=1 << 40)

FORWARD: dict[str, bool] = {"training": True, "backward": False}
BACKWARD: dict[str, bool] = {"training": True, "backward": True}
FIXED: dict[str, bool] = {"training": False, "backward": True}
EVAL: dict[str, bool] = {"training": False, "backward": False}
FROZEN = EVAL | {"frozen": True}  # no gradient of the weight
FROZEN_BACKWARD = FIXED | {"frozen": True}
MASKED = ("relu", "leaky_relu", "relu6")
SMOOTH = ("silu", "gelu", "elu", "hardswish", "sigmoid", "tanh")
ANY = (None, *MASKED, *SMOOTH)

# pass, residual, activations, (tensors, bit masks) at least, and where what is read twice comes from memory twice.
TABLE = [
    (FORWARD, False, ANY, (2, 0), (3, 0)),
    (FORWARD, True, (None, *SMOOTH), (3, 0), (4, 0)),
    (FORWARD, True, MASKED, (3, 1), (4, 1)),
    (BACKWARD, False, ANY, (3, 0), (5, 0)),
    (BACKWARD, True, (None,), (3, 0), (5, 0)),  # dy is the residual's gradient
    (BACKWARD, True, MASKED, (4, 1), (6, 2)),
    (BACKWARD, True, SMOOTH, (5, 0), (8, 0)),
    (FIXED, False, ANY, (3, 0), (3, 0)),
    (FIXED, True, (None,), (3, 0), (3, 0)),
    (FIXED, True, MASKED, (4, 1), (4, 1)),
    (FIXED, True, SMOOTH, (5, 0), (5, 0)),
    (EVAL, False, ANY, (2, 0), (2, 0)),
    (EVAL, True, ANY, (3, 0), (3, 0)),
    (FROZEN, False, (None, *SMOOTH), (2, 0), (2, 0)),
    (FROZEN, False, MASKED, (2, 1), (2, 1)),
    (FROZEN, True, (None, *SMOOTH), (3, 0), (3, 0)),
    (FROZEN, True, MASKED, (3, 1), (3, 1)),
    (FROZEN_BACKWARD, False, (None,), (2, 0), (2, 0)),
    (FROZEN_BACKWARD, False, MASKED, (2, 1), (2, 1)),
    (FROZEN_BACKWARD, False, SMOOTH, (3, 0), (3, 0)),
    (FROZEN_BACKWARD, True, (None,), (2, 0), (2, 0)),
    (FROZEN_BACKWARD, True, MASKED, (3, 1), (3, 1)),
    (FROZEN_BACKWARD, True, SMOOTH, (5, 0), (5, 0)),
]
ROWS = [
    pytest.param({**kind, "residual": residual, "activation": name}, least, twice, id=f"{index}-{name}")
    for index, (kind, residual, names, least, twice) in enumerate(TABLE)
    for name in names
]


def in_bytes(amount: tuple[int, int], dtype: torch.dtype) -> int:
    """A mask has a bit per element, in whole words of 32 and one more."""
    tensors, masks = amount
    elements = torch.Size(SHAPE).numel()
    return tensors * elements * dtype.itemsize + masks * (elements // 32 * 4 + 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", WITHOUT_L2, LARGE_L2], ids=["cpu", "without_l2", "large_l2"])
@pytest.mark.parametrize(("options", "least", "twice"), ROWS)
def test_bytes(
    options: dict[str, Any], least: tuple[int, int], twice: tuple[int, int], device: Any, dtype: torch.dtype
) -> None:
    plan = bnext.plan(SHAPE, dtype, device=device, **options)
    assert plan.bytes_minimum == in_bytes(least, dtype)
    assert plan.bytes_moved == in_bytes(least if device is LARGE_L2 else twice, dtype)


@pytest.mark.parametrize("options", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_what_stays_in_cache_is_read_once(options: dict[str, bool]) -> None:
    plan = bnext.plan((4, 8, 16, 16), residual=True, activation="relu", **options)
    assert plan.bytes_moved == plan.bytes_minimum


def test_a_layer_in_training_is_not_frozen() -> None:
    for device in (None, WITHOUT_L2):
        with pytest.raises(ValueError, match="expected frozen=True with training=False only"):
            bnext.plan((3, 4), frozen=True, device=device)


def test_an_activation_is_checked() -> None:
    with pytest.raises(ValueError, match=r"expected activation one of relu, .* or None, but got swish"):
        bnext.plan((3, 4), activation="swish")


@pytest.mark.parametrize("shape", [(2**40, 2**30), (2**31, 2**30), (2**30, 2**30), (2**24, 2**24)], ids=str)
def test_no_more_elements_than_machines_have(shape: tuple[int, ...]) -> None:
    for device in (None, WITHOUT_L2):
        with pytest.raises(ValueError, match=r"expected fewer than 2\^48 elements, but got shape \["):
            bnext.plan(shape, device=device)
    assert bnext.plan((2**24, 2**24 - 1)).bytes_moved > 2**49
