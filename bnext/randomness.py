"""The generators that a forward may draw from without being handed one: torch's, Python's, NumPy's."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["left_alone", "seed", "state"]


def seed(value: int) -> None:
    """Of all of them."""
    torch.manual_seed(value)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value)


def state() -> tuple[object, ...]:
    """Equal to another where nobody has drawn anything in between."""
    numpy = sys.modules.get("numpy")
    return (
        torch.get_rng_state().tolist(),
        [one.tolist() for one in torch.cuda.get_rng_state_all()] if _uses_gpus() else None,
        random.getstate(),
        None if numpy is None else pickle.dumps(numpy.random.get_state()),
    )


@contextmanager
def left_alone() -> Iterator[None]:
    """Whatever is drawn within it, what follows draws as if nothing had been."""
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(of_python)
            if numpy is not None:
                numpy.random.set_state(of_numpy)


def _uses_gpus() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
