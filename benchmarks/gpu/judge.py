"""From the results of a run to each class's figures, and from those to held, missed or not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.classes import Bar, Class, is_compiled
from benchmarks.gpu.results import Result, Run
from benchmarks.shapes import Case

HELD, MISSED, NOT_MEASURED = "held", "missed", "not measured"


def floor_seconds(case: Case, copy_rate: float) -> float:
    """In which the device's copy moves the bytes that the operation must move."""
    return case.bytes_minimum / copy_rate


def share_of_floor(result: Result, copy_rate: float) -> float | None:
    seconds = result.median("bnext")
    return None if seconds is None else floor_seconds(result.case, copy_rate) / seconds


@dataclass(frozen=True)
class Figures:
    """Of a class and an operation. None: a case is missing that it would need.

    The ratio to torch.compile, `compiled`, is that of the cases which are compiled alone.
    """

    share: float | None = None
    microseconds: float | None = None
    native: float | None = None
    compiled: float | None = None


def _compiled(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if is_compiled(result.case)]


def _total(results: Sequence[Result], name: str) -> float | None:
    """Seconds of all calls in a row."""
    medians = [(result.case.multiplicity, result.median(name)) for result in results]
    known = [times * median for times, median in medians if median is not None]
    return sum(known) if known and len(known) == len(medians) else None


def _total_ratio(results: Sequence[Result], peer: str) -> float | None:
    own, other = _total(results, "bnext"), _total(results, peer)
    return None if own is None or other is None else other / own


def _least_ratio(results: Sequence[Result], peer: str) -> float | None:
    ratios = [ratio for result in results if (ratio := result.ratio(peer)) is not None]
    return min(ratios) if ratios and len(ratios) == len(results) else None


def _summed(results: Sequence[Result], run: Run) -> Figures:
    """Of all calls of a network in a row."""
    own, copy_rate = _total(results, "bnext"), run.rates.get("copy")
    if own is None:
        return Figures()
    share = None
    if copy_rate is not None:
        share = sum(r.case.multiplicity * floor_seconds(r.case, copy_rate) for r in results) / own
    ratios = _total_ratio(results, "native"), _total_ratio(_compiled(results), "compile")
    return Figures(share, own * 1e6, *ratios)


def _worst(results: Sequence[Result], run: Run) -> Figures:
    """The least share, the longest time and the least ratio, of whichever cases."""
    copy_rate = run.rates.get("copy")
    own = [result.median("bnext") for result in results]
    times = [median for median in own if median is not None]
    if len(times) < len(results):
        return Figures()
    share = None
    if copy_rate is not None:
        share = min(floor_seconds(r.case, copy_rate) / t for r, t in zip(results, times, strict=True))
    ratios = _least_ratio(results, "native"), _least_ratio(_compiled(results), "compile")
    return Figures(share, max(times) * 1e6, *ratios)


def figures(group: Class, operation: str, run: Run) -> Figures:
    found = [run.find(case) for case in group.cases(operation)]
    results = [result for result in found if result is not None]
    if len(results) < len(found):
        return Figures()
    return (_summed if group.summed else _worst)(results, run)


def _verdict(holds: bool | None) -> str:
    return NOT_MEASURED if holds is None else HELD if holds else MISSED


def _reaches(ratio: float | None, bar: float) -> str:
    return _verdict(None if ratio is None else round(ratio, 2) >= bar)


def verdicts(bar: Bar, measured: Figures) -> tuple[str, ...]:
    """Of the time, of the ratio to torch's native kernels, and to torch.compile where there is a bar for that.

    What rounds to the bar in print has reached it.
    """
    if bar.share is not None:
        in_time = None if measured.share is None else round(measured.share, 3) >= bar.share
    else:
        assert bar.microseconds is not None
        in_time = (
            None if measured.microseconds is None else round(measured.microseconds, 2) <= bar.microseconds
        )
    found = (_verdict(in_time), _reaches(measured.native, bar.native))
    return found if bar.compiled is None else (*found, _reaches(measured.compiled, bar.compiled))
