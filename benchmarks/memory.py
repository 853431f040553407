"""How much activation memory conv-BN-activation blocks keep for backward, and their peak: torch's and ours.

    python -m benchmarks.memory
    python -m benchmarks.memory --shape 8x256x14x14 --blocks 16 --activation elu
    python -m benchmarks.memory --json benchmarks/results/memory.json

In place, torch's block writes its activation over the batch norm's output, and ours both over the convolution's.
`benchmarks/blocks.py` says how it is counted. An implementation is counted only after its output and input gradient
were compared with torch's. The exit code is 1 if one was wrong, or if in place saves less than BAR of what torch keeps
at its best.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from benchmarks import machine
from benchmarks.blocks import ACTIVATIONS, PEERS, Count, count, least_saved, saved
from benchmarks.report import wide_console
from benchmarks.shapes import LISTS, Shape, parse_shapes

BAR = 0.40  # of the memory kept that in place saves at least
MIB = 2**20


def _share(value: float | None) -> str:
    return "" if value is None else f"{round(value, 3) + 0.0:.1%}"  # no -0.0%


def table(counts: Sequence[Count], shape: Shape, blocks: int) -> Table:
    tensor = torch.Size(shape).numel() * torch.float32.itemsize
    units = ((MIB, 1), (tensor, 2))  # bytes, digits
    title = f"{blocks} blocks of {'x'.join(map(str, shape))} float32, a tensor of {tensor / MIB:.1f} MiB (T)"
    found = Table(title=title, title_justify="left")
    for heading in ("activation", "implementation"):
        found.add_column(heading, no_wrap=True)
    for heading in ("MiB kept", "T kept", "MiB peak", "T peak"):
        found.add_column(heading, justify="right")
    for quantity in ("kept", "peak"):
        for peer in PEERS:
            found.add_column(f"{quantity} less than {peer}", justify="right")
    for activation in dict.fromkeys(one.activation for one in counts):
        group = [one for one in counts if one.activation == activation]
        for one in group:
            cells = [f"{size / unit:.{digits}f}" for size in (one.kept, one.peak) for unit, digits in units]
            cells += [
                _share(saved(group, peer, quantity, one.implementation))
                for quantity in ("kept", "peak")
                for peer in PEERS
            ]
            found.add_row(activation, one.implementation, *cells)
        found.add_section()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", default="32x64x56x56", metavar="NxCxHxW", help="of every tensor (default: 32x64x56x56)")
    add("--blocks", type=int, default=8, help="convolutions of the stack (default: 8)")
    add("--activation", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    add("--json", type=Path, metavar="FILE", help="keep the counts")
    options = parser.parse_args(arguments)
    try:
        shape = parse_shapes(options.shape)[0][0]
    except ValueError as error:
        parser.error(str(error))
    if options.shape in LISTS or len(shape) != 4 or options.blocks < 1:
        parser.error("the stack needs one shape of four sizes and at least one block")

    counts = []
    try:
        for activation in options.activation:
            counts += count(activation, shape, options.blocks)
    except ArithmeticError as error:
        print(f"not counted: {error}", file=sys.stderr)
        return 1
    console = wide_console()
    console.print(table(counts, shape, options.blocks))
    missed = False
    for activation in options.activation:
        least = least_saved([one for one in counts if one.activation == activation])
        missed |= least < BAR
        console.print(f"{activation}: in place keeps {least:.1%} less than torch at its best, bar {BAR:.0%}")
    if options.json:
        settings = {"shape": shape, "blocks": options.blocks, "dtype": "float32"}
        kept = {
            "machine": machine.describe(),
            "settings": settings,
            "counts": [asdict(one) for one in counts],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
