"""Cases of the resident CUDA kernels on the CPU: how blocks keep slabs, shapes of which they share some, what to ask.

Alone, a block keeps a slab; sharing, blocks wait for each other, all alive at once; in turns, a group of blocks has
slabs one after another; in clusters, blocks read each other's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cases import BFLOAT16, FLOAT16, FLOAT32
from host_calls import HostCall, Result, Schedule
from host_checks import run_and_check

ALONE = Schedule(engine="resident")
SHARING = replace(ALONE, multiprocessors=24, shared_memory=16 << 10, multiprocessor_memory=34 << 10)
IN_TURNS = replace(SHARING, multiprocessors=12)
CLUSTERS = replace(IN_TURNS, cluster_blocks=8)

# What blocks can keep: float64 streams.
KEPT = [FLOAT32, BFLOAT16, FLOAT16]
every_kept = pytest.mark.parametrize("dtypes", KEPT, ids=str)

# With SHARING and IN_TURNS, blocks that share a slab: joined rows, columns of odd and of whole vectors, short runs,
# planes of odd and of whole vectors.
SHARED = [
    ((1700, 5), "nc"),
    ((130, 80), "nc"),
    ((280, 77), "nc"),
    ((150, 33, 3, 3), "nchw"),
    ((33, 3, 17, 31), "nchw"),
    ((33, 3, 16, 32), "nchw"),
    ((60, 7, 5, 4), "nhwc"),
]


def run_resident(calls: Sequence[HostCall], variant: str = "plain") -> list[Result]:
    """Right, and one launch each way."""
    results = run_and_check(calls, variant)
    for call, result in zip(calls, results, strict=True):
        assert result.launches == [1, int(call.backward)]
    return results
