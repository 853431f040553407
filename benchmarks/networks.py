"""Whole training steps of a network: torch's layers, bnext.convert, bnext.fuse, with torch.compile where asked for.

    python -m benchmarks.networks
    python -m benchmarks.networks --network resnet18 --batch 64 --dtype bfloat16 --layout channels_last
    python -m benchmarks.networks --network timm:efficientnet_b0  # where timm is installed
    python -m benchmarks.networks --implementation torch compile fuse --json FILE

A step is forward, loss and backward of all parameters, bfloat16 meaning autocast. Every implementation starts from the
same weights; it is timed only after its loss and the gradients of the first parameter were compared with torch's. A
round times each of them once, in an order drawn anew; the result is the median of the rounds.

A third of a step may go into pages that large tensors fault in anew, and how many depends on what the process did
before. Without them, for all implementations alike: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import bnext
from benchmarks import machine
from benchmarks.measure import Measurement
from benchmarks.report import wide_console
from benchmarks.resnet import KINDS, resnet

DTYPES = ("float32", "bfloat16")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMPLEMENTATIONS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "torch": lambda network, x: network,
    "compile": lambda network, x: torch.compile(network),
    "convert": lambda network, x: bnext.convert(network, subclasses=True),
    "fuse": lambda network, x: fused(network, x),
    "fuse_compile": lambda network, x: torch.compile(fused(network, x)),
}
PEERS = ("torch", "compile")
# Error of the gradient relative to torch's, as Euclidean norms: wrong results are to be caught. Fifty layers enlarge a
# rounding by as many divisions by a standard deviation, and of bfloat16 little is left in the first layer.
TOLERANCES = {"float32": 5e-2, "bfloat16": 0.5}


def network_of(name: str) -> nn.Module:
    """A ResNet of ours, or one of timm's networks, with weights drawn anew."""
    library, _, name_there = name.rpartition(":")
    if not library:
        network = resnet(name)
        # Branches that start small leave gradients that mean something after 50 layers.
        for module in network.modules():
            last = getattr(module, "bn3", getattr(module, "bn2", None))
            if last is not None:
                nn.init.constant_(last.weight, 0.2)
        return network
    import timm

    found: nn.Module = timm.create_model(name_there)
    return found


def known_network(name: str) -> str:
    """For argparse, which shows what is wrong."""
    known = name in KINDS
    if name.startswith("timm:"):
        try:
            import timm
        except (ImportError, RuntimeError) as error:  # it needs a torchvision that fits torch
            raise argparse.ArgumentTypeError(f"expected timm to be installed for {name}: {error}") from error
        known = timm.is_model(name.removeprefix("timm:"))
    if not known:
        raise argparse.ArgumentTypeError(f"expected {', '.join(KINDS)}, or timm:NAME, but got {name}")
    return name


def fused(network: nn.Module, x: Tensor) -> nn.Module:
    """Of a few small images: fuse computes steps of them in float64."""
    return bnext.fuse(network, x[:2, :, :64, :64])


class Trainer:
    """One implementation with its copy of the weights."""

    def __init__(self, name: str, network: nn.Module, x: Tensor, dtype: str) -> None:
        self.name, self.x, self.dtype = name, x, getattr(torch, dtype)
        self.labels = torch.arange(len(x))
        own = copy.deepcopy(network)
        self.first = next(own.parameters())
        with self.autocast():
            self.network = IMPLEMENTATIONS[name](own, x)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def step(self) -> float:
        """The loss; gradients are new tensors each time."""
        self.network.zero_grad()
        with self.autocast():
            scores = self.network(self.x)
        loss = F.cross_entropy(scores.float(), self.labels)
        loss.backward()
        return loss.item()

    def timed(self) -> tuple[float, float]:
        """(seconds, page faults) of a step."""
        faults, start = machine.page_faults(), time.perf_counter()
        self.step()
        return time.perf_counter() - start, machine.page_faults() - faults


def trainers(options: argparse.Namespace, dtype: str, layout: str) -> list[Trainer]:
    """Of every implementation; raises ArithmeticError where one does not compute what torch does."""
    torch.manual_seed(0)
    network = network_of(options.network).to(memory_format=LAYOUTS[layout])
    x = torch.randn(options.batch, 3, options.image, options.image).contiguous(memory_format=LAYOUTS[layout])
    made = [Trainer(name, network, x, dtype) for name in ("torch", *options.implementation)]
    expected = made[0].step(), made[0].first.grad.clone()
    for trainer in made[1:]:
        loss, gradient = trainer.step(), trainer.first.grad
        off = ((gradient - expected[1]).norm() / expected[1].norm()).item()
        if not (off <= TOLERANCES[dtype] and abs(loss - expected[0]) <= TOLERANCES[dtype]):
            raise ArithmeticError(
                f"{trainer.name}: loss {loss:.6g} instead of {expected[0]:.6g}, gradient off by {off:.2g}"
            )
    return made[1:]


def measure(made: Sequence[Trainer], rounds: int) -> list[Measurement]:
    """Interleaved."""
    results = {trainer.name: Measurement(trainer.name) for trainer in made}
    order = random.Random(0)
    shuffled = [*made]
    for trainer in made:  # warms up
        trainer.step()
    for _ in range(rounds):
        order.shuffle(shuffled)
        for trainer in shuffled:
            seconds, faults = trainer.timed()
            results[trainer.name].seconds.append(seconds)
            results[trainer.name].faults.append(faults)
    return [*results.values()]


def table(rows: dict[tuple[str, str], list[Measurement]], title: str) -> Table:
    found = Table(title=title, title_justify="left")
    for heading in ("dtype", "layout", "implementation"):
        found.add_column(heading, no_wrap=True)
    for heading in (
        "seconds",
        "fastest",
        "slowest",
        "page faults",
        *(f"faster than {peer}" for peer in PEERS),
    ):
        found.add_column(heading, justify="right")
    for (dtype, layout), results in rows.items():
        medians = {result.name: result.median for result in results}
        for one in results:
            ratios = [f"{medians[peer] / one.median:.2f}" if peer in medians else "" for peer in PEERS]
            spread = [f"{value:.3f}" for value in (one.median, min(one.seconds), max(one.seconds))]
            faults = f"{statistics.median(one.faults):.0f}"
            found.add_row(dtype, layout, one.name, *spread, faults, *ratios)
        found.add_section()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.networks", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", type=known_network, default="resnet50", help=f"{', '.join(KINDS)}, or timm:NAME")
    add("--batch", type=int, default=32, help="images of a step, 2 at least (default: 32)")
    add("--image", type=int, default=224, help="pixels of their side (default: 224)")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="bfloat16: autocast")
    add("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    add("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=["torch", "convert", "fuse"])
    add("--rounds", type=int, default=7)
    add("--threads", type=int, help="default: torch's")
    add("--json", type=Path, metavar="FILE", help="keep every round")
    options = parser.parse_args(arguments)
    if min(options.batch - 1, options.rounds, options.threads or 1) < 1 or options.image < 32:
        parser.error("--rounds and --threads must be at least 1, --batch at least 2, --image at least 32")
    if options.threads:
        torch.set_num_threads(options.threads)

    console = wide_console()
    rows = {}
    for dtype, layout in product(options.dtype, options.layout):
        try:
            rows[dtype, layout] = measure(trainers(options, dtype, layout), options.rounds)
        except ArithmeticError as error:
            print(f"not timed: {dtype}, {layout}, {error}", file=sys.stderr)
            return 1
    size = f"{options.batch}x3x{options.image}x{options.image}"
    console.print(
        table(rows, f"a training step of {options.network}, {size}, {torch.get_num_threads()} threads")
    )
    if options.json:
        settings = {key: getattr(options, key) for key in ("network", "batch", "image", "rounds")}
        settings |= {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
        results = [
            {"dtype": dtype, "layout": layout, "name": one.name, "seconds": one.seconds, "faults": one.faults}
            for (dtype, layout), group in rows.items()
            for one in group
        ]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        kept = {"machine": machine.describe(), "settings": settings, "results": results}
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
