"""Batch normalization for PyTorch with hand-written kernels.

- BatchNorm1d, BatchNorm2d, BatchNorm3d: drop-in replacements of torch.nn's
- SyncBatchNorm: the statistics of all processes of a group, on any device; synchronize: in a network that exists
- convert, fuse: put them into an existing network, in one line; restore: undoes convert
- freeze, unfreeze: layers that stay in eval; hold_statistics, checkpoint_contexts: batches that move no statistics
- functional.batch_norm: the function behind them
- reference, reference_activations: the same in NumPy and float64, the specification
- memory: what the blocks of large outputs keep, and how to limit it
- plan, build_info: which schedule a call takes, how the extension was built
- CudaDevice: a GPU described, for plans without one
"""

from ._build_check import require_build

require_build()

from . import batching, functional, memory, reference, reference_activations
from ._C import CudaDevice, build_info
from .freezing import freeze, unfreeze
from .holding import checkpoint_contexts, hold_statistics
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from .networks.conversion import convert, restore, synchronize
from .networks.fusion import fuse
from .planning import plan

batching.register()

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CudaDevice",
    "SyncBatchNorm",
    "__version__",
    "build_info",
    "checkpoint_contexts",
    "convert",
    "freeze",
    "functional",
    "fuse",
    "hold_statistics",
    "memory",
    "plan",
    "reference",
    "reference_activations",
    "restore",
    "synchronize",
    "unfreeze",
]
