"""Running statistics held while a batch is seen that should not move them."""

from __future__ import annotations

from contextlib import AbstractContextManager, ContextDecorator, nullcontext

__all__ = ["are_held", "checkpoint_contexts", "hold_statistics"]

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

    It may be entered again, within itself too, and decorates functions.
    """

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
