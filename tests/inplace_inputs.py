"""Inputs of calls that write over theirs: a leaf, which may not be written over, and what is computed from it."""

from __future__ import annotations

import torch
from torch import Tensor


def leaf() -> Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()


def values() -> Tensor:
    """Computed, so that they may be written over."""
    return leaf() * 1
