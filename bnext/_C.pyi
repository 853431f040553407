"""The compiled part, as far as Python sees it: the operators themselves are `torch.ops.bnext`."""

from typing import Any, Literal, final

from torch import Tensor

@final
class Plan:
    """What one call would do: which loops, on how many threads, over how many bytes."""

    @property
    def traversal(self) -> Literal["planes", "rows"]:
        """The loop nest: `planes` (channels lie apart, inner > 1) or `rows` (channels lie side by side)."""
    @property
    def schedule(self) -> Literal["fused", "split", "map"]:
        """`fused`: reduce and map slab by slab; `split`: reduce all, then map all; `map`: nothing to reduce."""
    @property
    def slabs(self) -> int:
        """Groups of channels, each small enough to stay in cache between reduce and map."""
    @property
    def slab_channels(self) -> int:
        """Channels of a slab."""
    @property
    def chunks(self) -> int:
        """Parts into which the positions of a slab are cut: by shape, never by the number of threads."""
    @property
    def threads(self) -> int:
        """Threads the call would use."""
    @property
    def beyond_cache(self) -> bool:
        """Whether the call's tensors are too large for the last-level cache, so that reading is fetched ahead."""
    @property
    def streaming_stores(self) -> bool:
        """Whether the result is written past the caches."""
    @property
    def cache_bytes(self) -> int:
        """What one slab wants to keep in cache."""
    @property
    def bytes_moved(self) -> int:
        """Bytes to and from memory under this schedule."""
    @property
    def bytes_minimum(self) -> int:
        """Bytes no schedule avoids: every tensor once."""

@final
class CudaDevice:
    """What a plan needs to know of a GPU: multiprocessors, bytes per second of its memory, bytes of its caches."""

    def __init__(
        self,
        multiprocessors: int,
        bandwidth: float,
        l2: int,
        shared_memory: int = 49152,
        block_threads: int = 1024,
        multiprocessor_memory: int | None = None,
        spare_multiprocessors: int = 0,
        cluster_blocks: int = 1,
        bulk_copies: bool = False,
        early_launches: bool = False,
    ) -> None: ...
    @property
    def multiprocessors(self) -> int: ...
    @property
    def bandwidth(self) -> float:
        """Bytes per second to and from memory."""
    @property
    def l2(self) -> int:
        """Bytes of the cache that all multiprocessors share."""
    @property
    def shared_memory(self) -> int:
        """Bytes that a block may ask for."""
    @property
    def block_threads(self) -> int:
        """Threads that a block may have."""
    @property
    def multiprocessor_memory(self) -> int:
        """Bytes of shared memory that the blocks on one multiprocessor have together, 1024 of each besides its own."""
    @property
    def spare_multiprocessors(self) -> int:
        """Left to others by kernels whose blocks wait for each other; BNEXT_CUDA_SPARE for calls."""
    @property
    def cluster_blocks(self) -> int:
        """Blocks of a cluster at most, which start together and see each other's memory; 1: there are no clusters."""
    @property
    def bulk_copies(self) -> bool:
        """Whether one instruction copies any number of bytes to shared memory (compute capability 9.0 and up)."""
    @property
    def early_launches(self) -> bool:
        """Whether a kernel may begin before the one that it follows has ended (compute capability 9.0 and up)."""

@final
class CudaPlan:
    """What one call would do on a GPU: which kernels, in how many blocks, over how many bytes."""

    @property
    def engine(self) -> Literal["streaming", "resident"]:
        """`streaming`: a kernel that reduces, then one that maps, walking backwards. `resident`: one kernel, whose
        blocks keep a slab of channels in shared memory between the two."""
    @property
    def why(self) -> str:
        """Why this engine was chosen."""
    @property
    def traversal(self) -> Literal["planes", "rows"]:
        """`planes` (a block works in one channel) or `rows` (in columns of channels that lie side by side)."""
    @property
    def launches(self) -> int:
        """Kernels of the call. Memory that is cleared before them, as a mask may be whose vectors share bytes, is not
        counted."""
    @property
    def reduce_blocks(self) -> int:
        """Blocks of the kernel that reduces; 0 where nothing is reduced."""
    @property
    def waiting_blocks(self) -> int:
        """Blocks that wait for each other, all on the device at once; 0: none does, but for those of a cluster."""
    @property
    def cluster(self) -> int:
        """Blocks of a cluster, which share a slab; 1: there are no clusters."""
    @property
    def bulk_copies(self) -> bool:
        """Whether slabs come to shared memory in runs, each by one instruction."""
    @property
    def early_map(self) -> bool:
        """Whether the kernel that maps begins while the one that reduces runs, and then waits for it."""
    @property
    def block_memory(self) -> int:
        """Bytes of shared memory that a resident block asks for."""
    @property
    def reduce_threads(self) -> int:
        """Threads of each block of the kernel that reduces."""
    @property
    def map_blocks(self) -> int:
        """Blocks of the kernel that maps; 0 where none does by itself."""
    @property
    def map_threads(self) -> int:
        """Threads of each block of the kernel that maps."""
    @property
    def scratch_bytes(self) -> int:
        """Memory for partial sums during the call."""
    @property
    def streaming_stores(self) -> bool:
        """Whether the result is written past L2."""
    @property
    def bytes_moved(self) -> int:
        """Bytes to and from memory under this plan, with what L2 keeps from one kernel to the next."""
    @property
    def bytes_minimum(self) -> int:
        """Bytes no schedule avoids: every tensor once."""
    @property
    def floor_seconds(self) -> float:
        """bytes_minimum at the device's bandwidth."""

def batch_norm(*arguments: object) -> Tensor | None:
    """The operator on the arguments of its schema, y alone; None, and nothing done, where torch.ops must be asked."""

ACTIVATIONS: tuple[str, ...]  # names that the operators know
WITH_PARAMETER: tuple[str, ...]
MASKED: tuple[str, ...]  # those of which a bit per element tells the gradient

def check_activation(activation: str | None, activation_param: float | None, inplace: bool) -> None: ...
def build_info() -> dict[str, Any]: ...
def empty_cache() -> int: ...
def cached_bytes() -> int: ...
def set_cache_limit(bytes: int) -> None: ...
def plan(
    shape: list[int],
    dtype: str,
    channels_last: bool,
    training: bool,
    backward: bool,
    threads: int | None,
    residual: bool,
    activation: str | None,
    frozen: bool,
) -> Plan: ...
def cuda_plan(
    shape: list[int],
    dtype: str,
    channels_last: bool,
    training: bool,
    backward: bool,
    device: CudaDevice,
    residual: bool,
    activation: str | None,
    frozen: bool,
    engine: str,
) -> CudaPlan: ...
def cuda_device(index: int) -> CudaDevice: ...
