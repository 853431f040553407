"""Running statistics held while a batch is seen that should not move them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from typing import Any, TypeVar

__all__ = ["are_held", "checkpoint_contexts", "hold_statistics"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_RUN_LATER = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)

_depth = 0  # of the process: data parallelism and backward run layers in threads of their own


def are_held() -> bool:
    """Whether a :func:`hold_statistics` is in force."""
    return _depth > 0


class hold_statistics(ContextDecorator):
    """Within it layers in training normalise as ever, and leave running statistics and counters alone.

    For a batch seen twice (sharpness-aware minimisation, checkpointing) or one that is not of the data (adversarial
    ones). It holds for all of bnext's layers, those of every thread, and in eval it means nothing::

        with bnext.hold_statistics():
            loss(model(perturbed)).backward()

    It may be entered again, within itself too, and decorates functions, but none that run later: generators and
    coroutines are refused with TypeError.
    """

    def __call__(self, function: _Function) -> _Function:
        """The function, within it. TypeError: it would run later."""
        if any(runs_later(function) for runs_later in _RUN_LATER):
            raise TypeError(
                "expected a function whose call runs it, but got a generator or coroutine function: "
                "put `with bnext.hold_statistics():` into it"
            )
        return super().__call__(function)

    def __enter__(self) -> None:
        global _depth
        _depth += 1

    def __exit__(self, *error: object) -> None:
        global _depth
        _depth -= 1


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For ``torch.utils.checkpoint``, whose second forward would update running statistics once more.

    ::

        checkpoint(block, x, use_reentrant=False, context_fn=bnext.checkpoint_contexts)

    Not under torch.compile, whose checkpointing takes contexts of another kind.

    Returns:
        What the forward runs in, nothing, and what its repetition in backward does, :func:`hold_statistics`.
    """
    return nullcontext(), hold_statistics()
