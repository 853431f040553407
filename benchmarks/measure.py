"""Validate, then time: all implementations of one case in one process, interleaved.

A round times every implementation once, in an order drawn anew each round, so that whatever else the
machine does hits all of them alike; the result is the median of the rounds. A timed sample is a loop of
calls long enough for the clock, after a few that are not counted, so that each implementation finds the
caches and the heap as its own last calls left them. A call lives from its first instruction until its results
are freed: training gives memory back too.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.machine import page_faults
from benchmarks.peers import Data, Subject, eager_module
from benchmarks.shapes import Case

SAMPLE_SECONDS = 1e-3  # a sample lasts at least this long: ten thousand ticks of the clock
CALLS_BEFORE = 3  # a sample: the second or third gives back to the system what another had freed
WARM_UP_CALLS = 3  # compiles, fills allocator caches, lets oneDNN keep its primitives

# Largest error against torch in float64, as a share of the largest value: an implementation that is further
# off is not timed. It has to catch wrong results only, and to let torch's own pass, whose float32 sums over a
# million rows are good to three or four digits; exactness is the test suite's. Per dtype of x: tensors stored
# in it (16 bits: a few units in the last place of the largest value), and sums over a channel.
TOLERANCES = {
    "float64": (1e-12, 1e-9),
    "float32": (1e-3, 1e-2),
    "bfloat16": (4 * 2.0**-8, 1e-2),
    "float16": (4 * 2.0**-11, 1e-2),
}
OF_INPUTS = ("dx", "dresidual")  # results with an element for each of x, as y


@dataclass
class Measurement:
    """Seconds and page faults per call of one implementation on one case, one number per round."""

    name: str
    seconds: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _forward(subject: Subject) -> Tensor:
    return subject.call(*subject.inputs)


def _gradients(subject: Subject, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, subject.wanted, subject.dy)


def _timed_part(subject: Subject, operation: str) -> tuple[Callable[[], object], Callable[[object], object]]:
    """(set-up outside the clock, whose value goes to) (the call inside the clock)."""
    if subject.module is None or operation in ("forward", "eval"):
        return (lambda: None), (lambda _: _forward(subject))
    if operation == "backward":
        return (lambda: _forward(subject)), (lambda y: _gradients(subject, y))
    return (lambda: None), (lambda _: _gradients(subject, _forward(subject)))


class _Clock:
    """Times one subject; the number of calls in a sample is found once, from its own speed."""

    def __init__(self, subject: Subject, operation: str) -> None:
        self.set_up, self.call = _timed_part(subject, operation)
        self.repeat = 1
        for _ in range(WARM_UP_CALLS):
            self.sample()
        self.repeat = max(1, min(1000, round(SAMPLE_SECONDS / max(self.sample()[0], 1e-7))))

    def sample(self) -> tuple[float, float]:
        """(seconds, page faults) per call."""
        for _ in range(CALLS_BEFORE):
            self.call(self.set_up())
        ready = [self.set_up() for _ in range(self.repeat)]
        faults, start = page_faults(), time.perf_counter()
        for value in ready:
            self.call(value)
        end = time.perf_counter()
        return (end - start) / self.repeat, (page_faults() - faults) / self.repeat


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection inside a sample, and an error instead of a silent recompilation."""
    gc.collect()
    gc.disable()
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            yield
    finally:
        gc.enable()


def measure(case: Case, subjects: Sequence[Subject], rounds: int, budget: float) -> list[Measurement]:
    """At least `rounds` rounds, and more until `budget` seconds are spent on this case."""
    results = {subject.name: Measurement(subject.name) for subject in subjects}
    with torch.set_grad_enabled(case.learns):
        clocks = [(_Clock(subject, case.operation), results[subject.name]) for subject in subjects]
        order = random.Random(0)
        with _undisturbed():
            deadline = time.monotonic() + budget
            done = 0
            while done < rounds or time.monotonic() < deadline:
                order.shuffle(clocks)
                for clock, result in clocks:
                    seconds, faults = clock.sample()
                    result.seconds.append(seconds)
                    result.faults.append(faults)
                done += 1
    return list(results.values())


def _results(subject: Subject, case: Case) -> dict[str, Tensor]:
    """Every result of one call on a fresh module, as strided tensors."""
    if subject.module is None:
        return {"y": _forward(subject)}
    with torch.set_grad_enabled(case.learns):
        y = _forward(subject)
        results = {"y": subject.dense(y.detach())}
        if case.learns:
            gradients, count = _gradients(subject, y), len(subject.inputs)
            results |= zip(OF_INPUTS, map(subject.dense, gradients[:count]), strict=False)
            results |= zip(("dweight", "dbias"), gradients[count:], strict=False)
            results |= {
                name.rpartition(".")[2]: buffer.clone()  # torch's layer may be the first of two
                for name, buffer in subject.module.named_buffers()
                if buffer.dim()
            }
    return results


def settled(case: Case, data: Data) -> Data:
    """With a dy of 0 where relu's input is zero up to the tolerance.

    There another rounding takes the other slope, a sum of two 16-bit tensors for one, and sums over a channel show it.
    """
    if case.activation is None or not case.learns:
        return data
    plain = eager_module(case, dtype=torch.float64, activated=False).to(data.x.device)
    with torch.no_grad():
        z = plain(*(tensor.double() for tensor in data.inputs)).abs_()
        near = z <= TOLERANCES[case.dtype][0] * z.max()
        return data._replace(dy=data.dy.clone().masked_fill_(near, 0))


def reference(case: Case, data: Data) -> dict[str, Tensor]:
    """The results of torch's layer in float64."""
    module = eager_module(case, dtype=torch.float64).to(data.x.device)
    wide = tuple(tensor.detach().double().requires_grad_(case.learns) for tensor in data.inputs)
    return _results(Subject("reference", module, wide, data.dy.double(), module), case)


def disagreements(case: Case, subject: Subject, expected: dict[str, Tensor]) -> list[str]:
    """What the subject gets wrong, one sentence per tensor. A copy has x to reproduce."""
    elementwise, summed = TOLERANCES[case.dtype]
    if subject.module is None:
        expected = {"y": subject.inputs[0].double()}
    wrong = []
    for name, actual in _results(subject, case).items():
        error = (actual.double() - expected[name]).abs_().max().item()
        size = expected[name].abs().max().item()
        allowed = (elementwise if name in ("y", *OF_INPUTS) else summed) * size
        if not error <= allowed:
            wrong.append(f"{case}: {subject.name} {name} is off by {error:.2g}, allowed {allowed:.2g}")
    return wrong
