"""The memory of large outputs on the CPU: freed blocks are kept for the next tensor of the size.

Memory fresh from the system costs as much as normalizing it: every page faults at its first touch. Outputs and input
gradients of 2 MB and more therefore come from blocks of huge pages that are used again. A quarter of what may be kept,
at most 512 MB, is kept as it is. The system may take back the pages of other blocks that nobody uses (MADV_FREE),
though tools may go on counting them as the process's own. A block that nobody asks for in a long time makes room for
others. Where address space is limited (ulimit -v, vm.overcommit_memory=2), what is kept is missing elsewhere: limit it.
"""

from operator import index

from . import _C

__all__ = ["cached_bytes", "empty_cache", "set_limit"]


def empty_cache() -> int:
    """Gives every block that is kept back to the system.

    Returns:
        Their bytes.
    """
    return _C.empty_cache()


def cached_bytes() -> int:
    """Bytes of the blocks that are kept for reuse; tensors in use do not count."""
    return _C.cached_bytes()


def set_limit(limit: int) -> None:
    """Keeps at most that many bytes from now on; 0 keeps nothing.

    Args:
        limit: bytes; at first a quarter of the machine's memory, or of what the process or its container may have.

    Raises:
        TypeError: not an integer.
        ValueError: negative, or 2**63 and more.
    """
    if not 0 <= index(limit) < 2**63:
        raise ValueError(f"expected a limit of 0 to 2**63 - 1 bytes, but got {limit}")
    _C.set_cache_limit(limit)
