"""The benchmark's command line: any subset of operations, shapes, dtypes, layouts and implementations.

    python -m benchmarks.run          ResNet-50's shapes, float32, both layouts, all operations
    python -m benchmarks.run --operation step --shapes nc 64x33x7x7 --dtype bfloat16 --budget 5
    python -m benchmarks.run --variant bn_add_relu --operation step --dtype bfloat16 --layout channels_last
    python -m benchmarks.run --memory existing --operation forward --implementation bnext clone copy_
    python -m benchmarks.run --json benchmarks/results/resnet50.json

The exit code is 1 if an implementation was left out because its results were wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import machine, measure, peers, report, shapes

# Tensors alive at once in a case: x, dy, residual, y, dx, dresidual of five layouts, and holes between them.
POOL_TENSORS = 36


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--operation",
        nargs="+",
        choices=shapes.OPERATIONS,
        default=list(shapes.OPERATIONS),
        metavar="OPERATION",
    )
    add(
        "--shapes",
        nargs="+",
        default=["resnet50"],
        metavar="LIST|SHAPE",
        help=f"of {', '.join(shapes.LISTS)}, or a shape such as 32x64x56x56 (default: resnet50)",
    )
    add("--dtype", nargs="+", choices=shapes.DTYPES, default=["float32"])
    add("--layout", nargs="+", choices=shapes.LAYOUTS, default=list(shapes.LAYOUTS))
    add("--variant", nargs="+", choices=shapes.VARIANTS, default=["bn"], help="the layer timed (default: bn)")
    add(
        "--implementation",
        nargs="+",
        choices=peers.IMPLEMENTATIONS,
        default=list(peers.IMPLEMENTATIONS),
        metavar="NAME",
        help=f"of {', '.join(peers.IMPLEMENTATIONS)} (default: all)",
    )
    add(
        "--subject", choices=peers.IMPLEMENTATIONS, help="whose ratios to print (default: the first that ran)"
    )
    add("--rounds", type=int, default=7, help="rounds of a case at least (default: 7)")
    add(
        "--budget",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="add rounds to a case up to this time (default: 1)",
    )
    add("--threads", type=int, help="torch's threads (default: torch's own choice)")
    add(
        "--memory",
        choices=("new", "existing"),
        default="new",
        help="new: as in training, large results in newly mapped memory; existing: freed memory is kept and "
        "reused, so that no result faults in a page (the fair comparison with y.copy_(x))",
    )
    add("--json", type=Path, metavar="FILE", help="keep everything that was measured")
    return parser


def _prepare(
    case: shapes.Case, names: Sequence[str], notes: dict[str, None]
) -> tuple[list[peers.Subject], list[str]]:
    """The implementations whose results are right, and what was wrong with the others."""
    data = measure.settled(case, peers.data(case))
    expected = measure.reference(case, data)
    subjects, wrong = [], []
    for name in names:
        try:
            subject = peers.build(name, case, data)
        except peers.Unsupported as reason:
            notes[f"{name}: {reason}"] = None
            continue
        complaints = measure.disagreements(case, subject, expected)
        wrong += complaints
        if not complaints:
            subjects.append(subject)
    return subjects, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        cases = list(
            shapes.cases(options.operation, options.shapes, options.dtype, options.layout, options.variant)
        )
    except ValueError as error:
        parser.error(str(error))
    if not cases:
        parser.error("these choices leave no case: channels_last needs shapes of four or five sizes")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory == "existing":
        machine.keep_memory(POOL_TENSORS * max(case.tensor_bytes for case in cases))
    else:
        machine.settle_memory()

    console = report.wide_console()
    errors = Console(stderr=True)
    facts = machine.describe()
    load = os.getloadavg()[0]
    if load > 0.25 * torch.get_num_threads():
        errors.print(
            f"[yellow]the machine is busy (load {load:.1f}): times will be too long and ratios off[/yellow]"
        )
    rows: list[report.Row] = []
    wrong: list[str] = []
    notes: dict[str, None] = {}
    for case in track(cases, description="cases", console=errors):
        subjects, complaints = _prepare(case, options.implementation, notes)
        wrong += complaints
        measurements = measure.measure(case, subjects, options.rounds, options.budget)
        by_name = {measurement.name: measurement for measurement in measurements}
        rows.append(report.Row(case, by_name, peers.scheduled_bytes(case)))

    report.show(rows, console, options.subject)
    for note in notes:
        console.print(f"not everywhere: {note}", soft_wrap=True)
    for complaint in wrong:
        console.print(f"[red]not timed: {complaint}[/red]", soft_wrap=True)
    if options.json:
        settings = {key: getattr(options, key) for key in ("rounds", "budget", "threads", "memory")}
        report.write(options.json, rows, facts | {"load": load}, settings)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
