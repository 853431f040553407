"""A run on a GPU as a JSON file, and back: the machine, its rates, every round of every case, the stages.

A run without anything in it is a run too: everything in its table then reads "not measured".
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.shapes import Case


@dataclass
class Result:
    """One case: seconds per call of each implementation, a number per round, and why one is missing."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        rounds = self.seconds.get(name)
        return statistics.median(rounds) if rounds else None

    def ratio(self, peer: str) -> float | None:
        """How many times faster than the peer bnext is."""
        own, other = self.median("bnext"), self.median(peer)
        return None if own is None or other is None else other / own


@dataclass
class Run:
    """`rates` are of the device itself: copy and read in bytes per second, node in seconds per kernel of a graph."""

    machine: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    host: Result | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)

    def find(self, case: Case) -> Result | None:
        return next((result for result in self.results if result.case == case), None)

    def put_stages(self, stages: Sequence[dict[str, Any]]) -> None:
        """In place of earlier ones of the same names, behind the others."""
        names = {stage["name"] for stage in stages}
        self.stages = [stage for stage in self.stages if stage["name"] not in names] + [*stages]

    def put(self, result: Result) -> None:
        """In place of an earlier result of the same case, if there is one."""
        found = self.find(result.case)
        if found is None:
            self.results.append(result)
        else:
            self.results[self.results.index(found)] = result


def _plain(result: Result) -> dict[str, Any]:
    return {**asdict(result.case), "seconds": result.seconds, "notes": result.notes}


def _result(plain: dict[str, Any]) -> Result:
    seconds, notes = plain.pop("seconds"), plain.pop("notes")
    return Result(Case(**{**plain, "shape": tuple(plain["shape"])}), seconds, notes)


def _lines(name: str, items: Sequence[Any]) -> str:
    """A list with an item per line."""
    return (
        f' "{name}": [' + ",".join(f"\n  {json.dumps(item)}" for item in items) + ("\n ]" if items else "]")
    )


def write(path: Path, run: Run) -> None:
    host = None if run.host is None else _plain(run.host)
    head = json.dumps({"machine": run.machine, "rates": run.rates, "host": host}, indent=1)[:-2]
    path.parent.mkdir(parents=True, exist_ok=True)
    body = [_lines("stages", run.stages), _lines("results", [_plain(result) for result in run.results])]
    new = path.with_suffix(".new")  # a whole file takes its place, whoever is interrupted
    new.write_text(",\n".join([head, *body]) + "\n}\n")
    new.replace(path)


def read(path: Path) -> Run:
    kept = json.loads(path.read_text())
    return Run(
        machine=kept["machine"],
        rates=kept["rates"],
        results=[_result(plain) for plain in kept["results"]],
        host=None if kept["host"] is None else _result(kept["host"]),
        stages=kept["stages"],
    )
