"""Tables from results: `python -m benchmarks.report FILE.json...` prints those of a run that was kept.

A ratio is the peer's time over the subject's, above 1 where the subject is faster. Where the peer is a
copy, its time is that for the bytes which the operation must move: 1 means that the operation costs no more
than memory traffic.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measurement
from benchmarks.peers import COPIES, IMPLEMENTATIONS
from benchmarks.shapes import Case

MINIMUM_WIDTH = 180  # columns, where output goes to a file


def wide_console() -> Console:
    """Of the terminal, or wide enough for a table in a file."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, MINIMUM_WIDTH)
    return console


@dataclass
class Row:
    """One case with the measurement of every implementation that ran it."""

    case: Case
    by_name: dict[str, Measurement]
    scheduled: int | None = None  # bytes that bnext's call moves as its plan says; None: not kept

    def seconds(self, name: str) -> float:
        """Median time of the operation; for a copy, of the bytes that the operation must move."""
        scale = self.case.bytes_minimum / (2 * self.case.tensor_bytes) if name in COPIES else 1.0
        return self.by_name[name].median * scale

    def ratio(self, subject: str, peer: str) -> float | None:
        if subject not in self.by_name or peer not in self.by_name:
            return None
        return self.seconds(peer) / self.seconds(subject)

    def rate(self, name: str) -> float:
        """GB/s (1e9 bytes) of the bytes that the operation must move."""
        return self.case.bytes_minimum / self.seconds(name) / 1e9


@dataclass(frozen=True)
class Summary:
    """Ratios to one peer over one list; `weighted` by multiplicity, `total` of all its calls in a row."""

    mean: float
    weighted: float
    total: float
    worst: float
    worst_shape: str


def summarize(rows: Sequence[Row], subject: str, peer: str) -> Summary | None:
    pairs = [(row, ratio) for row in rows if (ratio := row.ratio(subject, peer)) is not None]
    if not pairs:
        return None
    times = [row.case.multiplicity for row, _ in pairs]
    logs = [math.log(ratio) for _, ratio in pairs]

    def total(name: str) -> float:
        return sum(n * row.seconds(name) for n, (row, _) in zip(times, pairs, strict=True))

    worst_row, worst = min(pairs, key=lambda pair: pair[1])
    return Summary(
        mean=math.exp(statistics.fmean(logs)),
        weighted=math.exp(math.fsum(map(operator.mul, logs, times)) / sum(times)),
        total=total(peer) / total(subject),
        worst=worst,
        worst_shape=worst_row.case.label,
    )


def group_of(case: Case) -> tuple[str, ...]:
    """What the cases of a table have in common."""
    return (case.variant, case.shapes, case.operation, case.dtype, case.layout)


def _groups(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row.case), []).append(row)
    return groups


def _names(rows: Sequence[Row]) -> list[str]:
    """The implementations that ran any of the rows, in the order of the registry."""
    return [name for name in IMPLEMENTATIONS if any(name in row.by_name for row in rows)]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4f}" if seconds < 1e-3 else f"{seconds * 1e3:.2f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.4g}"


def _detail(key: tuple[str, ...], rows: Sequence[Row], subject: str) -> Table:
    peers = [name for name in _names(rows) if name != subject and name not in COPIES]
    copies = [name for name in _names(rows) if name in COPIES]
    title = f"{' '.join(key)}: at least {rows[0].case.minimum}, GB/s of that; moved: by bnext as scheduled"
    table = Table(title=title, title_justify="left")
    for heading in ("shape", "calls", "T MB", "least MB", "moved MB", f"{subject} ms", "GB/s", "faults"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in copies:
        table.add_column(f"of {name} rate", justify="right")
    for name in peers:
        table.add_column(f"{name} ms", justify="right")
        table.add_column("ratio", justify="right", style="bold")
    for row in rows:
        if subject not in row.by_name:
            continue
        own = row.by_name[subject]
        cells = [row.case.label, str(row.case.multiplicity)]
        cells += [_megabytes(row.case.tensor_bytes), _megabytes(row.case.bytes_minimum)]
        cells.append("" if row.scheduled is None else _megabytes(row.scheduled))
        cells += [
            _milliseconds(own.median),
            f"{row.rate(subject):.1f}",
            f"{statistics.median(own.faults):.0f}",
        ]
        for name in copies:
            share = row.ratio(subject, name)
            cells.append("" if share is None else f"{share:.0%}")
        for name in peers:
            ratio = row.ratio(subject, name)
            cells += ["", ""] if ratio is None else [_milliseconds(row.by_name[name].median), f"{ratio:.2f}x"]
        table.add_row(*cells)
    return table


def _overview(groups: dict[tuple[str, ...], list[Row]], subject: str, peers: Sequence[str]) -> Table:
    table = Table(
        title=f"{subject}: how many times faster (geometric means; total = all calls in a row)",
        title_justify="left",
    )
    for heading in ("cases", "against"):
        table.add_column(heading, no_wrap=True)
    for heading in ("mean", "weighted", "total", "worst"):
        table.add_column(heading, justify="right")
    table.add_column("worst shape", no_wrap=True)
    for key, rows in groups.items():
        for peer in peers:
            found = summarize(rows, subject, peer)
            if found is not None:
                numbers = (found.mean, found.weighted, found.total, found.worst)
                table.add_row(
                    " ".join(key), peer, *(f"{number:.2f}x" for number in numbers), found.worst_shape
                )
        table.add_section()
    return table


def show(rows: Sequence[Row], console: Console, subject: str | None = None) -> None:
    """Print a table per list, operation, dtype and layout, then the overview with means and worst cases."""
    names = _names(rows)
    subject = subject or next(iter(names), "")
    groups = _groups(rows)
    for key, group in groups.items():
        console.print(_detail(key, group, subject))
    console.print(_overview(groups, subject, [name for name in names if name != subject]))


def write(path: Path, rows: Sequence[Row], machine: dict[str, Any], settings: dict[str, Any]) -> None:
    """Keep everything: where and how it was measured, and every round of every measurement, in seconds."""
    results = [
        {
            **asdict(row.case),
            "scheduled": row.scheduled,
            "measurements": [asdict(measurement) for measurement in row.by_name.values()],
        }
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(result) for result in results)
    head = json.dumps({"machine": machine, "settings": settings}, indent=1)
    path.write_text(f'{head[:-2]},\n "results": [\n  {lines}\n ]\n}}\n')


def read(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a kept run, and the machine that made it."""
    kept = json.loads(path.read_text())
    rows = []
    for result in kept["results"]:
        measurements = [Measurement(**measurement) for measurement in result.pop("measurements")]
        scheduled = result.pop("scheduled", None)  # runs from before it was kept
        case = Case(**{**result, "shape": tuple(result["shape"])})
        rows.append(Row(case, {measurement.name: measurement for measurement in measurements}, scheduled))
    return rows, kept["machine"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print the tables of kept runs.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument(
        "--subject", choices=IMPLEMENTATIONS, help="whose ratios to print (default: the first that ran)"
    )
    options = parser.parse_args(arguments)
    for path in options.files:
        rows, machine = read(path)
        console = wide_console()
        console.print(
            f"{path.name}: commit {machine['commit']}, {machine['date']}, {machine['cpu']}", soft_wrap=True
        )
        show(rows, console, options.subject)
    return 0


if __name__ == "__main__":
    sys.exit(main())
