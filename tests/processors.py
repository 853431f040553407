"""What the CPU engine may find itself on: instruction sets of this machine, and machines to make plans for."""

from __future__ import annotations

import bnext
from host_calls import Processor

_BUILD = bnext.build_info()
_SETS = list(_BUILD["instruction_sets"])
# From the chosen one on: the table is ordered, and what comes before it this machine cannot run.
RUNNABLE = _SETS[_SETS.index(_BUILD["instruction_set"]) :]

# Has room for no slab of the tests.
SMALL = Processor(threads=3, private_cache=4 << 10, shared_cache=16 << 10)
# Whose plans cut a tensor in every way: no cache but the core's own, slabs of some channels, a cache of which the third
# that others use would be wanted.
MACHINES = [
    Processor(),
    SMALL,
    Processor(threads=2, private_cache=64 << 10, shared_cache=1 << 20),
    Processor(threads=4, private_cache=256 << 10, shared_cache=420_000, cache_of_host=True),
]
