"""`bnext.plan`: asks the extension which schedule a call would take, without making the call.

A plan for a GPU needs no GPU: `CudaDevice` describes one, by its multiprocessors, caches and bandwidth.
"""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from . import _C
from ._C import CudaDevice
from .layouts import CHANNELS_LAST, format_of


def _means_channels_last(layout: str | torch.memory_format, rank: int) -> bool:
    if layout in ("contiguous", torch.contiguous_format):
        return False
    if layout not in ("channels_last", *CHANNELS_LAST.values()):
        raise ValueError(
            f"expected layout 'contiguous', 'channels_last' or a torch.memory_format, but got {layout!r}"
        )
    if rank not in CHANNELS_LAST or layout not in ("channels_last", CHANNELS_LAST[rank]):
        raise ValueError(f"expected a layout for {rank} dimensions, but got {layout}")
    return True


def _gpu(device: torch.device | str | CudaDevice | None) -> CudaDevice | None:
    """The description of a GPU, None for the CPU."""
    if device is None or isinstance(device, CudaDevice):
        return device
    place = torch.device(device)
    if place.type == "cpu":
        return None
    if place.type != "cuda":
        raise ValueError(f"expected device cpu, cuda or a CudaDevice, but got {place}")
    number = place.index
    if number is None:
        number = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _C.cuda_device(number)


def plan(
    x_or_shape: Tensor | Sequence[int],
    dtype: torch.dtype | None = None,
    layout: str | torch.memory_format | None = None,
    training: bool = True,
    backward: bool = False,
    threads: int | None = None,
    device: torch.device | str | CudaDevice | None = None,
    *,
    residual: bool = False,
    activation: str | None = None,
    frozen: bool = False,
    engine: str | None = None,
) -> _C.Plan | _C.CudaPlan:
    """Says how bnext would work on an input: traversal, schedule or engine, threads or blocks, bytes moved.

    Args:
        x_or_shape: a tensor, or the shape of one, channels at dimension 1.
        dtype: storage type; unless given the tensor's own, float32 for a shape.
        layout: 'contiguous', 'channels_last' or a torch.memory_format; unless given the tensor's own,
            contiguous for a shape.
        training: with the batch's statistics; False: with the running ones. Forward, True also means that backward
            follows, for which relu, leaky_relu and relu6 after a residual leave a bit mask.
        backward: the plan of the backward pass; False: of the forward pass.
        threads: how many may work on the CPU; unless given torch.get_num_threads().
        device: where; unless given the tensor's own, the CPU for a shape. A `CudaDevice` describes a GPU that need
            not be there.
        residual: with a tensor of the input's size that is added before the activation; backward: with its gradient.
        activation: one of functional.ACTIVATIONS, or None. Without a residual it moves no bytes, unless `frozen`.
        frozen: beside training=False, the pass of a step in which weight and bias require no grad
            (:func:`bnext.freeze`): relu, leaky_relu and relu6 leave a mask in any case, and backward needs no sums,
            nor x but for another activation.
        engine: on a GPU 'streaming' or 'resident' rather than what the plan would choose, as the environment variable
            BNEXT_CUDA_ENGINE does for calls. Other passes than those of training have one engine.

    Returns:
        A read-only object with the fields that `_C.pyi` lists.

    Raises:
        TypeError: neither a tensor nor a sequence of integers.
        ValueError: a shape, dtype, layout, number of threads, device or activation that no call could have, frozen
            in training, or an engine that cannot take this one.
        RuntimeError: a GPU of this machine in a build without CUDA.
    """
    if isinstance(x_or_shape, Tensor):
        shape = list(x_or_shape.shape)
        dtype = x_or_shape.dtype if dtype is None else dtype
        device = x_or_shape.device if device is None else device
    else:
        try:
            shape = [index(size) for size in x_or_shape]
        except TypeError:
            raise TypeError(f"expected a tensor or a sequence of integers, but got {x_or_shape!r}") from None
    dtype_name = str(torch.float32 if dtype is None else dtype).removeprefix("torch.")
    if layout is not None:
        last = _means_channels_last(layout, len(shape))
    else:
        last = isinstance(x_or_shape, Tensor) and format_of(x_or_shape) != torch.contiguous_format
    gpu = _gpu(device)
    if gpu is None:
        if engine is not None:
            raise ValueError(f"expected engine with a GPU only, but got {engine!r}")
        return _C.plan(shape, dtype_name, last, training, backward, threads, residual, activation, frozen)
    if threads is not None:
        raise ValueError(f"expected threads with the CPU only, but got {threads} and device {device}")
    chosen = "automatic" if engine is None else engine
    call = (shape, dtype_name, last, training, backward, gpu, residual, activation, frozen)
    return _C.cuda_plan(*call, chosen)
