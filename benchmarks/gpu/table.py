"""The Markdown of a run: who measured and when, then one table, a row for each bar and under it one for each case.

python -m benchmarks.gpu --table FILE.json     writes FILE.md
python -m benchmarks.gpu --table               writes benchmarks/results/gpu.md, of no run at all
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.classes import CLASSES, Bar, Class, is_compiled
from benchmarks.gpu.judge import MISSED, NOT_MEASURED, figures, share_of_floor, verdicts
from benchmarks.gpu.results import Result, Run
from benchmarks.shapes import Case

COLUMNS = (
    "case",
    "operation",
    "dtype, layout",
    "calls",
    "MB",
    "us",
    "GB/s",
    "of copy",
    "x native",
    "x cuDNN",
    "x compile",
    "bar",
    "verdict",
)
NUMBERS = COLUMNS[3:11]
LEGEND = (
    "Kernel time of one call, replayed from a CUDA graph over inputs that are not in L2. GB/s and the share of the "
    "device's copy rate are of the bytes that the operation must move: forward and eval 2 tensors, backward 3; with "
    "a residual and a ReLU 3 and 4, and a bit per element for the mask between them. x: how many times faster than "
    "torch's native kernels (separate calls where the layer is several), cuDNN (`native` where torch would not take "
    "it) and torch.compile (of a part of the cases, and its bar for that part). Bars of a network are for the sum of "
    "its calls, others for the worst case."
)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return NOT_MEASURED if value is None else form.format(value * scale)


def _peer(result: Result, name: str) -> str:
    if name == "compile" and not is_compiled(result.case):
        return ""
    ratio = result.ratio(name)
    return result.notes.get(name, NOT_MEASURED) if ratio is None else f"{ratio:.2f}"


def _bar_text(bar: Bar) -> str:
    time = f"<= {bar.microseconds:g} us" if bar.share is None else f">= {bar.share:.0%}"
    compiled = "" if bar.compiled is None else f"; >= {bar.compiled:.1f}x compile"
    return f"{time}; >= {bar.native:.1f}x{compiled}"


def _how(group: Class) -> str:
    return "sum" if group.summed else "worst"


def _class_row(group: Class, operation: str, bar: Bar, run: Run) -> list[str]:
    found = figures(group, operation, run)
    words = verdicts(bar, found)
    in_time = bar.share is None  # the longest time of several shapes says something only where it has a bar
    return [
        f"**{group.name}**, {_how(group)}",
        operation,
        "",
        "",
        "",
        _number(found.microseconds, "{:.2f}") if group.summed or in_time else "",
        "",
        "" if in_time else _number(found.share, "{:.1%}"),
        _number(found.native, "{:.2f}"),
        "",
        "" if bar.compiled is None else _number(found.compiled, "{:.2f}"),
        _bar_text(bar),
        words[0] if len(set(words)) == 1 else "; ".join(words),
    ]


def _case_row(case: Case, run: Run) -> list[str]:
    start = [case.label, case.operation, f"{case.dtype}, {case.layout}", str(case.multiplicity)]
    start.append(f"{case.tensor_bytes / 1e6:.2f}")
    result = run.find(case)
    seconds = None if result is None else result.median("bnext")
    if result is None or seconds is None:
        why = "" if result is None else result.notes.get("bnext", "")
        return [*start, NOT_MEASURED, *[""] * 5, "", why]
    copy_rate = run.rates.get("copy")
    share = None if copy_rate is None else share_of_floor(result, copy_rate)
    return [
        *start,
        f"{seconds * 1e6:.2f}",
        f"{case.bytes_minimum / seconds / 1e9:.0f}",
        _number(share, "{:.1%}"),
        *(_peer(result, name) for name in ("native", "cudnn", "compile")),
        "",
        "",
    ]


def _host_row(result: Result) -> list[str]:
    case = result.case
    own = result.median("bnext")
    return [
        f"**host time**, {case.label}",
        f"{case.operation}, eager",
        f"{case.dtype}, {case.layout}",
        "1",
        f"{case.tensor_bytes / 1e6:.2f}",
        _number(own, "{:.2f}", 1e6),
        "",
        "",
        _peer(result, "native"),
        "",
        "",
        "",
        "",
    ]


def rows(run: Run) -> list[list[str]]:
    table = []
    for group in CLASSES:
        for operation, bar in group.bars.items():
            table.append(_class_row(group, operation, bar, run))
            if run.results:
                table += [_case_row(case, run) for case in group.cases(operation)]
    if run.host is not None:
        table.append(_host_row(run.host))
    return table


def missed(run: Run) -> list[str]:
    """The bars that were measured and missed, in words."""
    said = []
    for group in CLASSES:
        for operation, bar in group.bars.items():
            found = figures(group, operation, run)
            if MISSED not in verdicts(bar, found):
                continue
            own = (
                _number(found.microseconds, "{:.2f} us")
                if bar.share is None
                else _number(found.share, "{:.1%}")
            )
            compiled = "" if None in (bar.compiled, found.compiled) else f", {found.compiled:.2f}x compile"
            text = f"{own} and {_number(found.native, '{:.2f}')}x{compiled}, bar {_bar_text(bar)}"
            said.append(f"{group.name}, {_how(group)} {operation}: {text}")
    return said


def _stage(stage: dict[str, Any]) -> str:
    return f"{stage['name']} {stage['outcome']} ({stage['seconds']:.0f} s)"


def _heading(run: Run) -> list[str]:
    gpu = run.machine.get("gpu", {})
    if not gpu:
        return ["Measured nowhere yet; `make gpu` on a machine with a GPU writes a file like this beside it."]
    lines = [
        f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, torch {run.machine['torch']}, "
        f"commit {run.machine['commit'] or 'unknown'}, {run.machine['date']}."
    ]
    if run.rates:
        rates = run.rates
        lines.append(
            f"The device copies {rates['copy'] / 1e9:.0f} GB/s (read and written), reads {rates['read'] / 1e9:.0f} "
            f"GB/s, and takes {rates['node'] * 1e6:.2f} us for an empty kernel in a graph."
        )
    if run.stages:
        lines.append("Stages: " + ", ".join(map(_stage, run.stages)) + ".")
    return lines


def markdown(run: Run) -> str:
    align = ["---:" if column in NUMBERS else "---" for column in COLUMNS]
    table = [list(COLUMNS), align, *rows(run)]
    return (
        "\n\n".join(
            [
                "# bnext on a GPU",
                *_heading(run),
                LEGEND,
                "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in table),
            ]
        )
        + "\n"
    )
