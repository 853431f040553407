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

def batch_norm(*arguments: object) -> Tensor | None:
    """The operator on the arguments of its schema, y alone; None, and nothing done, where torch.ops must be asked."""

def build_info() -> dict[str, Any]: ...
def empty_cache() -> int: ...
def cached_bytes() -> int: ...
def set_cache_limit(bytes: int) -> None: ...
def plan(
    shape: list[int],
    dtype: str,
    layout: str,
    training: bool,
    backward: bool,
    threads: int | None,
) -> Plan: ...
