"""The generators that a forward may draw from without being handed one: torch's, Python's, NumPy's."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["left_alone", "seed", "state"]


def seed(value: int) -> None:
    """Seeds all of them."""
    # Without a GPU torch.manual_seed notes the seed, and a stack of calls, for one that might yet come.
    of_torch = torch if torch.accelerator.is_available() else torch.default_generator
    of_torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def state() -> tuple[object, ...]:
    """Of all of them; equal to an earlier one if nobody has drawn anything since."""
    return (
        torch.get_rng_state().tolist(),
        [one.tolist() for one in torch.cuda.get_rng_state_all()] if _uses_gpus() else None,
        random.getstate(),
        pickle.dumps(np.random.get_state()),
    )


@contextmanager
def left_alone() -> Iterator[None]:
    """Puts all of them back in the end, whatever was drawn within it."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _uses_gpus() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
