"""Both engines of the CUDA kernels, case by case: which wins where, and by how much.

    python -m benchmarks.gpu.engines [--folder build/gpu/engines] [--seconds 120]
    python -m benchmarks.gpu.engines --table          the table alone, of what the folder holds

Each engine is forced in a process of its own. A case that an engine cannot take, or that nobody timed, reads
"not measured".
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import results
from benchmarks.gpu.classes import CLASSES
from benchmarks.gpu.judge import NOT_MEASURED
from benchmarks.shapes import Case

ENGINES = ("streaming", "resident")
ROOT = Path(__file__).resolve().parents[2]


def median(run: results.Run, case: Case) -> float | None:
    """Seconds of a call of ours."""
    found = run.find(case)
    return None if found is None else found.median("bnext")


def rows(runs: Sequence[results.Run]) -> list[list[str]]:
    """A row for each case of each class that trains, and one that says how often which engine won there."""
    table = []
    for group in CLASSES:
        ratios = []
        lines = []
        cases = [case for operation in group.bars if operation != "eval" for case in group.cases(operation)]
        for case in cases:
            seconds = [median(run, case) for run in runs]
            cells = [NOT_MEASURED if s is None else f"{s * 1e6:.2f}" for s in seconds]
            streaming, resident = seconds
            if streaming is None or resident is None:
                won = NOT_MEASURED
            else:
                ratios.append(streaming / resident)
                won = f"{ENGINES[ratios[-1] > 1]}, {max(ratios[-1], 1 / ratios[-1]):.2f} x"
            lines.append([f"{case.shapes}, {case}", *cells, won])
        verdict = NOT_MEASURED
        if ratios:
            wins = sum(ratio > 1 for ratio in ratios)
            verdict = (
                f"resident in {wins} of {len(ratios)}, {statistics.geometric_mean(ratios):.2f} x on average"
            )
        if cases:
            table += [[f"**{group.name}**", "", "", verdict], *lines]
    return table


def markdown(runs: Sequence[results.Run]) -> str:
    head = ["case", *(f"{engine}, us" for engine in ENGINES), "faster"]
    lines = [head, ["---"] * len(head), *rows(runs)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.engines", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu" / "engines")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each engine (default: 120)")
    parser.add_argument("--table", action="store_true", help="time nothing")
    options = parser.parse_args(arguments)
    runs = []
    for engine in ENGINES:
        kept = options.folder / f"{engine}.json"
        if not options.table:
            kept.unlink(missing_ok=True)
            command = ["-m", "benchmarks.gpu.bench", "--json", str(kept), "--seconds", str(options.seconds)]
            environment = {**os.environ, "BNEXT_CUDA_ENGINE": engine}
            subprocess.run([sys.executable, *command, "--only", "bnext"], cwd=ROOT, env=environment)
        runs.append(results.read(kept) if kept.exists() else results.Run())
    print(markdown(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
