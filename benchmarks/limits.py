"""What memory allows: `python -m benchmarks.limits FILE.json...` reads runs that were kept.

The fastest pass over a tensor in a run is a copy, or inference by one of the implementations: it reads and
writes it once. Were all bytes moved at its rate, an operation would take

    time of that pass * bytes moved / 2T

and be as many times faster than torch's eager layer as its time is longer than that. It is given for the least
bytes that the operation can move, and for those that bnext's call does move as its plan has it: more where a
slab of channels is larger than a core's cache, so that x comes from memory twice. Where x comes from a cache the
second time, a call may do better than the latter. From there to what was measured it is arithmetic, and memory
that waits for it.

The run must hold eval beside the other operations, with eager among the implementations.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import Row, group_of, read, wide_console

SUBJECT, PEER = "bnext", "eager"


@dataclass(frozen=True)
class Limit:
    """Of one case: the measured ratio to eager, and what it would be at the rate of the fastest pass."""

    measured: float
    as_scheduled: float
    at_least: float  # bytes moved, not the ratio


def _tensor(row: Row) -> tuple[object, ...]:
    return (row.case.variant, row.case.shapes, row.case.shape, row.case.dtype, row.case.layout)


def seconds_per_byte(rows: Sequence[Row]) -> dict[tuple[object, ...], float]:
    """By tensor: of the fastest inference or copy."""
    fastest: dict[tuple[object, ...], float] = {}
    for row in rows:
        if row.case.operation == "eval":
            best = min(row.seconds(name) for name in row.by_name) / row.case.bytes_minimum
            fastest[_tensor(row)] = min(best, fastest.get(_tensor(row), best))
    return fastest


def limits(rows: Sequence[Row]) -> Iterator[tuple[Row, Limit]]:
    """Of every case but inference whose tensor went through inference in the same run."""
    fastest = seconds_per_byte(rows)
    for row in rows:
        measured = row.ratio(SUBJECT, PEER)
        pace = fastest.get(_tensor(row))
        if row.case.operation == "eval" or measured is None or pace is None:
            continue
        moved = max(row.scheduled or 0, row.case.bytes_minimum)
        eager = row.seconds(PEER)
        yield row, Limit(measured, eager / (pace * moved), eager / (pace * row.case.bytes_minimum))


def show(rows: Sequence[Row], console: Console) -> None:
    """A line for each operation, dtype and layout: geometric means, the smallest in brackets."""
    groups: dict[tuple[str, ...], list[Limit]] = {}
    for row, limit in limits(rows):
        groups.setdefault(group_of(row.case), []).append(limit)
    table = Table(title=f"times faster than {PEER}: mean (worst)", title_justify="left")
    table.add_column("cases", no_wrap=True)
    for heading in ("measured", "all bytes moved at the fastest pass's rate", "the least bytes so"):
        table.add_column(heading, justify="right")
    for key, found in groups.items():
        columns = zip(*((limit.measured, limit.as_scheduled, limit.at_least) for limit in found), strict=True)
        cells = [f"{statistics.geometric_mean(column):.2f} ({min(column):.2f})" for column in columns]
        table.add_row(" ".join(key), *cells)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    console = wide_console()
    for path in options.files:
        rows, machine = read(path)
        console.print(f"{path}: commit {machine['commit']}, {machine['cpu']}", soft_wrap=True)
        if not any(limits(rows)):
            print(
                f"{path}: expected eval beside training, with {SUBJECT} and {PEER}, but got none",
                file=sys.stderr,
            )
            return 1
        show(rows, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
