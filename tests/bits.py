"""Results compared bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of a training step of one layer.
RESULTS = ("y", "dx", "dweight", "dbias", "running_mean", "running_var", "num_batches_tracked")


def assert_same_bits(
    got: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str] = RESULTS
) -> None:
    """Results are called by these names; if there are more of them, as a network's, by their place."""
    assert len(got) == len(expected)
    called = names if len(got) <= len(names) else range(len(got))
    for name, one, other in zip(called, got, expected, strict=False):
        assert torch.equal(one, other), f"{name}: {int((one != other).sum())} of {one.numel()} differ"
