"""`python -m benchmarks.gpu`: runs the stages on a GPU, goes on after a failure, sums up, writes JSON and Markdown.

    python -m benchmarks.gpu [--only smoke bench] [--results FOLDER] [--logs FOLDER]
    python -m benchmarks.gpu --table [FILE.json]    the table alone, of a run or of none
    python -m benchmarks.gpu --needs                prints the device's architecture, or what is missing and exits 1

bnext must be built; `make gpu` builds it first. The exit code is 1 if a stage failed, whatever the bars say.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import needs, stages

RESULTS = stages.ROOT / "benchmarks" / "results"
LOGS = stages.ROOT / "build" / "gpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    names = [stage.name for stage in stages.stages(LOGS, RESULTS)]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="for JSON and Markdown"
    )
    parser.add_argument("--logs", type=Path, default=LOGS, metavar="FOLDER", help="for what stages print")
    parser.add_argument(
        "--table",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE.json",
        help="write the table alone, of no run if bare",
    )
    parser.add_argument("--needs", action="store_true", help="only look whether the machine can do it")
    return parser


def write_table(source: Path | None, target: Path) -> None:
    """The Markdown of a run that was kept, or of none."""
    from benchmarks.gpu import results, table

    run = results.Run() if source is None else results.read(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(table.markdown(run))


def keep(outcomes: Sequence[stages.Outcome], kept: Path, described: dict[str, Any]) -> list[str]:
    """Adds the stages to the file that the benchmark wrote, or to one of nothing; returns the bars missed.

    What the file has of the same commit stays, but for stages of these names.
    """
    from benchmarks.gpu import results, table

    run = results.read(kept) if kept.exists() else results.Run(described)
    if run.machine["commit"].rstrip("+") != described["commit"].rstrip("+"):
        run = results.Run(described)
    run.put_stages([outcome.plain() for outcome in outcomes])
    results.write(kept, run)
    write_table(kept, kept.with_suffix(".md"))
    return table.missed(run)


def run_stages(options: argparse.Namespace) -> int:
    import torch

    from benchmarks import machine
    from benchmarks.gpu import device

    kept = options.results.resolve() / f"{needs.file_name(torch.cuda.get_device_name(0))}.json"
    logs = options.logs.resolve()
    described = {**machine.describe(), "gpu": device.describe()}  # now, for a stage may break the device
    chosen = [s for s in stages.stages(logs, kept) if not options.only or s.name in options.only]
    if any(stage.name == "bench" for stage in chosen):
        kept.unlink(
            missing_ok=True
        )  # should the benchmark not get so far, the old figures are not this run's
    start = time.monotonic()
    outcomes = stages.run_all(chosen, logs, lambda known: keep(known, kept, described))
    print(f"\n== summary, {time.monotonic() - start:.0f} s in all, logs in {os.path.relpath(logs)}")
    print("\n".join(stages.summary(outcomes)))
    for bar in keep(outcomes, kept, described):
        print(f"missed: {bar}")
    print(kept.with_suffix(".md"))
    return 1 if any(outcome.outcome == stages.FAILED for outcome in outcomes) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.table is not None:
        source = None if options.table == Path() else options.table
        target = options.results / "gpu.md" if source is None else source.with_suffix(".md")
        write_table(source, target)
        print(target)
        return 0
    what = needs.missing()
    if what is not None:
        print(what, file=sys.stderr)
        return 1
    if options.needs:
        print(needs.capability())
        return 0
    return run_stages(options)


if __name__ == "__main__":
    sys.exit(main())
