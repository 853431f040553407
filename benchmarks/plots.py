"""Pictures of kept runs: `python -m benchmarks.plots FILE.json... [--out FOLDER]`.

Two kinds, whichever the file has the cases for:
    cost      time of a call while one problem grows a thousand times (lists growth, growth_nc), logarithmic axes
    ratios    how many times faster than each peer, shape by shape
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.peers import COPIES, IMPLEMENTATIONS
from benchmarks.report import Row, read
from benchmarks.shapes import OPERATIONS

# One colour per implementation in every picture (Okabe and Ito's set, safe for colour-blind readers).
COLOURS = {
    "bnext": "#0072B2",
    "eager": "#D55E00",
    "compile": "#E69F00",
    "onednn": "#009E73",
    "onednn_blocked": "#56B4E9",
    "clone": "#999999",
    "copy_": "#000000",
}


def slope(megabytes: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent p of the power law time ~ size^p that fits best; 1 is linear."""
    return float(np.polyfit(np.log(megabytes), np.log(seconds), 1)[0])


def _save(name: str, folder: Path) -> None:
    path = folder / f"{name}.png"
    plt.savefig(path, dpi=150, bbox_inches="tight")
    plt.close()
    print(path)


def _names(rows: Sequence[Row]) -> list[str]:
    return [name for name in IMPLEMENTATIONS if any(name in row.by_name for row in rows)]


def _by_operation(rows: Sequence[Row]) -> dict[str, list[Row]]:
    panels = {name: [row for row in rows if row.case.operation == name] for name in OPERATIONS}
    return {name: panel for name, panel in panels.items() if panel}


def _cost_panel(axes: Axes, rows: Sequence[Row]) -> None:
    rows = sorted(rows, key=lambda row: row.case.tensor_bytes)
    for name in _names(rows):
        timed = [row for row in rows if name in row.by_name]
        megabytes = [row.case.tensor_bytes / 1e6 for row in timed]
        seconds = [row.by_name[name].median for row in timed]
        text = name
        if len(timed) > 1:
            steepest = np.max(np.diff(np.log(seconds)) / np.diff(np.log(megabytes)))
            text += f": {seconds[-1] / seconds[0]:,.0f}x, slope {slope(megabytes, seconds):.2f}"
            text += f", steepest {steepest:.2f}"
        dashes = "--" if name in COPIES else "-"
        axes.loglog(
            megabytes, np.multiply(seconds, 1e3), dashes, marker="o", ms=3, color=COLOURS[name], label=text
        )
    growth = rows[-1].case.tensor_bytes / rows[0].case.tensor_bytes
    axes.set_xlabel(f"tensor, MB (grows {growth:,.0f}x)")
    axes.set_ylabel("ms per call")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=7)


def _ratio_panel(axes: Axes, rows: Sequence[Row], subject: str) -> None:
    peers = [name for name in _names(rows) if name != subject]
    for name in peers:
        ratios = [row.ratio(subject, name) for row in rows]
        points = [(ratio, index) for index, ratio in enumerate(ratios) if ratio is not None]
        if points:
            axes.semilogx(*zip(*points, strict=True), "o", ms=5, color=COLOURS[name], label=name)
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [row.case.label for row in rows])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xlabel(f"time of the peer / time of {subject}")
    axes.grid(which="both", axis="x", alpha=0.3)
    axes.legend(fontsize=7)


def draw(rows: Sequence[Row], stem: str, folder: Path, subject: str) -> None:
    """One picture per variant, list, dtype and layout, a panel per operation; files are named after the run."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        case = row.case
        groups.setdefault((case.variant, case.shapes, case.dtype, case.layout), []).append(row)
    for (variant, shapes, dtype, layout), group in groups.items():
        panels = _by_operation(group)
        tall = 4.0 if shapes.startswith("growth") else 2.5 + 0.25 * max(map(len, panels.values()))
        figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), tall), squeeze=False)
        for panel, (operation, chosen) in zip(axes[0], panels.items(), strict=True):
            panel.set_title(f"{variant} {operation}, {dtype}, {layout}")
            if shapes.startswith("growth"):
                _cost_panel(panel, chosen)
            else:
                _ratio_panel(panel, chosen, subject)
        figure.tight_layout()
        kind = "cost" if shapes.startswith("growth") else "ratios"
        name = shapes if variant == "bn" else f"{variant}_{shapes}"
        _save(f"{stem}_{kind}_{name}_{dtype}_{layout}", folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw kept runs.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, help="folder of the pictures (default: beside each file)")
    parser.add_argument("--subject", choices=IMPLEMENTATIONS, default="bnext", help="whose ratios to draw")
    options = parser.parse_args(arguments)
    mpl.use("Agg")
    for path in options.files:
        rows, _ = read(path)
        folder = options.out or path.parent
        folder.mkdir(parents=True, exist_ok=True)
        draw(rows, path.stem, folder, options.subject)
    return 0


if __name__ == "__main__":
    sys.exit(main())
