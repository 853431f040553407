"""What conv-BN-activation blocks keep for backward, counted: as many tensors as can be told beforehand, and no more."""

from __future__ import annotations

import pytest
import torch

from benchmarks.blocks import (
    ACTIVATIONS,
    Count,
    Stack,
    allocated_bytes,
    count,
    kept_bytes,
    least_saved,
    names,
    saved,
)

SHAPE = (8, 8, 96, 96)  # 2.25 MB of float32: large enough for blocks of bnext.memory
BLOCKS = 4
TENSOR = 4 * torch.Size(SHAPE).numel()
SMALL = 0.01 * TENSOR  # vectors of a value per channel

# Tensors kept. A block keeps its convolution's output and input, but for the first, whose input was there before:
# 2 * BLOCKS - 1. torch's activation keeps its input besides, or its output where that is the same tensor.
KEPT = {
    ("torch", True): 3 * BLOCKS - 1,
    ("torch in place", True): 2 * BLOCKS,
    ("bnext", True): 2 * BLOCKS - 1,
    ("bnext in place", True): BLOCKS,
    ("torch", False): 2 * BLOCKS - 1,
    ("bnext", False): 2 * BLOCKS - 1,
    ("bnext in place", False): BLOCKS,
}
CASES = [(name, activation) for activation in ACTIVATIONS for name in names(activation)]


@pytest.mark.parametrize(("name", "activation"), CASES)
def test_what_is_kept(name: str, activation: str) -> None:
    stack = Stack(name, activation, SHAPE, BLOCKS)
    kept = kept_bytes(stack.forward, stack.before)
    tensors = KEPT[name, activation != "none"]
    assert tensors * TENSOR <= kept <= tensors * TENSOR + BLOCKS * SMALL
    # The allocators agree: what forward has left is that, and its output where that is not kept.
    _, left = allocated_bytes(stack.forward)
    output = 0 if name.endswith("in place") else TENSOR
    assert left == pytest.approx(kept + output, abs=BLOCKS * SMALL)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_place_saves(activation: str) -> None:
    """At least 40 %, whether or not torch's activation is in place; results and gradients are compared on the way."""
    counts = count(activation, SHAPE, BLOCKS)
    assert least_saved(counts) >= 0.40
    peaks = {one.implementation: one.peak for one in counts}
    in_place = peaks.pop("bnext in place")
    assert all(in_place < peak for peak in peaks.values())


def test_a_peak_is_not_what_is_left() -> None:
    def call() -> torch.Tensor:
        large = torch.zeros(1 << 20)
        return large[:1].clone()

    assert allocated_bytes(call) == (4 * (1 << 20) + 4, 4)


def test_a_storage_counts_once_and_not_if_it_was_there() -> None:
    x = torch.randn(1000, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()  # kept as output, then twice as input
        return y * y.view(10, 100).view(-1)

    assert kept_bytes(forward, ()) == 4000
    assert kept_bytes(lambda: forward() * x, (x,)) == 8000


def test_shares() -> None:
    counts = [Count("none", "torch", 100, 400), Count("none", "bnext in place", 55, 300)]
    assert saved(counts, "torch") == pytest.approx(0.45) == least_saved(counts)
    assert saved(counts, "torch", "peak") == pytest.approx(0.25)
    assert saved(counts, "torch in place") is None
