"""What the resident CUDA kernels take of compute capability 9.0, over the execution model on the CPU: clusters, and
copies in bulk. Every call is whole, against the float64 reference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from cases import FLOAT32, LAYOUT, TRAIN, Active, Dtypes
from host_calls import HostCall, Schedule
from problem import joined, make
from resident_cases import ALONE, CLUSTERS, IN_TURNS, SHARED, SHARING, every_kept, run_resident

# Runs that are copied in bulk: joined rows, whole ones, planes whose runs end within what is copied at once.
LONG_RUNS = [
    ((512, 8), "nc"),
    ((160, 32), "nc"),
    ((9, 3, 16, 32), "nchw"),
    ((2, 2, 40, 56), "nchw"),
    ((3, 2, 16, 20, 8), "ncdhw"),
]


@every_kept
def test_clusters(dtypes: Dtypes) -> None:
    """Of any size that there is; also where no more than one is alive at a time."""
    calls = [
        HostCall(problem, schedule, shifts=shifts, counter=3)
        for shape, name in SHARED
        for problem in [make(shape, LAYOUT[name], dtypes, TRAIN)]
        for schedule in (CLUSTERS, replace(CLUSTERS, order="random", seed=3, resident_blocks=1))
        for shifts in ((0, 0, 0), (1, 0, 0), (1, 1, 1))
    ]
    sizes = set()
    for result in run_resident(calls):
        sizes |= {
            cluster for cluster, waiting in zip(result.cluster, result.waiting, strict=True) if not waiting
        }
    assert len(sizes - {1}) >= 4 and max(sizes) <= 8


@pytest.mark.parametrize(
    "schedule", [ALONE, SHARING, IN_TURNS, CLUSTERS], ids=["alone", "sharing", "in turns", "clusters"]
)
@every_kept
def test_bulk_copies(dtypes: Dtypes, schedule: Schedule) -> None:
    """The bits are those of copies of 16 bytes."""
    calls = [
        HostCall(problem, replace(schedule, bulk_copies=bulk, order=order, seed=2), counter=3)
        for shape, name in LONG_RUNS
        for problem in (
            make(shape, LAYOUT[name], dtypes, TRAIN),
            joined(Active("relu"), shape, name, dtypes, TRAIN),
            joined(Active("silu"), shape, name, dtypes, TRAIN),
        )
        for bulk, order in ((False, "ascending"), (True, "ascending"), (True, "random"))
    ]
    results = run_resident(calls)
    for k in range(0, len(results), 3):
        assert [result.bulk for result in results[k : k + 3]] == [[0, 0], [1, 1], [1, 1]]
        assert len({result.bits() for result in results[k : k + 3]}) == 1


def test_shifted_tensors_are_not_copied_in_bulk() -> None:
    calls = [
        HostCall(
            make(shape, LAYOUT[name], FLOAT32, TRAIN), replace(ALONE, bulk_copies=True), shifts=(1, 1, 1)
        )
        for shape, name in LONG_RUNS
    ]
    assert not any(any(result.bulk) for result in run_resident(calls))
