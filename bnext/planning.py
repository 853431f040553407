"""`bnext.plan`: asks the extension which schedule a call would take, without making the call."""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from . import _C

# The ranks for which torch has a channels-last order, and so the operators too.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _layout_of(x: Tensor) -> str:
    """How the operators read x: strides of neither kind are copied to contiguous first."""
    last = _CHANNELS_LAST.get(x.dim())
    if x.is_contiguous() or last is None or not x.is_contiguous(memory_format=last):
        return "contiguous"
    return "channels_last"


def _layout_named(layout: str | torch.memory_format, rank: int) -> str:
    if layout in ("contiguous", torch.contiguous_format):
        return "contiguous"
    if layout not in ("channels_last", *_CHANNELS_LAST.values()):
        raise ValueError(
            f"expected layout 'contiguous', 'channels_last' or a torch.memory_format, but got {layout!r}"
        )
    if rank not in _CHANNELS_LAST or layout not in ("channels_last", _CHANNELS_LAST[rank]):
        raise ValueError(f"expected a layout for {rank} dimensions, but got {layout}")
    return "channels_last"


def plan(
    x_or_shape: Tensor | Sequence[int],
    dtype: torch.dtype | None = None,
    layout: str | torch.memory_format | None = None,
    training: bool = True,
    backward: bool = False,
    threads: int | None = None,
) -> _C.Plan:
    """Says how bnext would work on an input: traversal, schedule, threads, bytes moved.

    Args:
        x_or_shape: a tensor, or the shape of one, channels at dimension 1.
        dtype: storage type; unless given the tensor's own, float32 for a shape.
        layout: 'contiguous', 'channels_last' or a torch.memory_format; unless given the tensor's own,
            contiguous for a shape.
        training: with the batch's statistics; False: with the running ones.
        backward: the plan of the backward pass; False: of the forward pass.
        threads: how many may work; unless given torch.get_num_threads().

    Returns:
        A read-only object with the fields that `_C.pyi` lists.

    Raises:
        TypeError: neither a tensor nor a sequence of integers.
        ValueError: a shape, dtype, layout or number of threads that no call could have.
    """
    if isinstance(x_or_shape, Tensor):
        shape = list(x_or_shape.shape)
        dtype = x_or_shape.dtype if dtype is None else dtype
        layout = _layout_of(x_or_shape) if layout is None else layout
    else:
        try:
            shape = [index(size) for size in x_or_shape]
        except TypeError:
            raise TypeError(f"expected a tensor or a sequence of integers, but got {x_or_shape!r}") from None
    dtype_name = str(torch.float32 if dtype is None else dtype).removeprefix("torch.")
    layout_name = _layout_named("contiguous" if layout is None else layout, len(shape))
    return _C.plan(shape, dtype_name, layout_name, training, backward, threads)
