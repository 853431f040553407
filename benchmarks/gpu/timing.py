"""Kernel time of one case on a GPU: every implementation replayed from a CUDA graph, interleaved round by round.

A graph holds many calls in a row, each on the next of several sets of tensors and with outputs of its own, so that
no call finds in L2 what an earlier one of the graph left there: between two calls on one set lie at least three L2
caches of other data. Rotation rather than a flush between calls, because a flush inside the graph would have to be
timed and subtracted, and because a rotation also makes every write-back of y be paid for by the calls that follow.
Before each sample, outside the clock, a buffer much larger than L2 is read (not written: it leaves nothing to write
back). It evicts what the previous sample left, which is what makes tiny cases cold, whose sets all fit L2; and it
keeps the device busy while the host enqueues the graph.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import Data, Subject
from benchmarks.shapes import Case

SETS = 128  # at most: of tiny cases
GRAPH_BYTES = 2e9  # that a graph moves: half a millisecond, against which the start of a graph is nothing
L2_BETWEEN = 3
ROUNDS = 9
WARM_UP_CALLS = 3

# What an implementation is called here, and in peers.py. native and cudnn are torch's layer with either backend.
IMPLEMENTATIONS = {"bnext": "bnext", "native": "eager", "cudnn": "eager", "compile": "compile"}

Inputs = Sequence[Data]


@dataclass(frozen=True)
class Rotation:
    """Sets of inputs, and calls in a graph, a multiple of them."""

    sets: int
    calls: int


def rotation(call_bytes: int, l2_bytes: int) -> Rotation:
    """For calls that move so much at least."""
    sets = min(1 + math.ceil(L2_BETWEEN * l2_bytes / call_bytes), SETS)
    calls = min(max(math.ceil(GRAPH_BYTES / call_bytes), sets), SETS)
    return Rotation(sets, math.ceil(calls / sets) * sets)


def inputs(case: Case, sets: int, device: str) -> list[Data]:
    """Made on the device; each channel of x has its own mean and its own spread, as in peers.data."""
    generator = torch.Generator(device).manual_seed(0)
    per_channel = (1, -1) + (1,) * (len(case.shape) - 2)

    def random_values(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(case.torch_dtype).contiguous(memory_format=case.memory_format)

    def one() -> Data:
        mean = random_values(case.shape[1]).view(per_channel)
        std = (random_values(case.shape[1]).abs() + 0.5).view(per_channel)
        x = place(random_values(*case.shape).mul_(std).add_(mean))
        dy = place(random_values(*case.shape))
        made = Data(x, dy, place(random_values(*case.shape)) if case.residual else None)
        for tensor in made.inputs:
            tensor.requires_grad_(case.learns)
        return made

    return [one() for _ in range(sets)]


def backend(name: str) -> AbstractContextManager[None]:
    """While torch's layer is called or captured: with cuDNN, or with the native kernels alone."""
    return (
        torch.backends.cudnn.flags(enabled=name == "cudnn") if name in ("native", "cudnn") else nullcontext()
    )


def takes_cudnn(case: Case, x: Tensor) -> bool:
    """Whether torch would call cuDNN for the case."""
    module = peers.norm_module(case).to(x.device)
    state = (module.weight, module.bias, module.running_mean, module.running_var)
    with backend("cudnn"):
        chosen = torch._C._select_batch_norm_backend(x, *state, case.training, module.eps)
    return bool(chosen == torch._C._BatchNormBackend.Cudnn)


def build(name: str, case: Case, data: Data) -> Subject:
    """The implementation on one set; raises peers.Unsupported."""
    if name == "cudnn" and not takes_cudnn(case, data.x):
        raise peers.Unsupported("native")
    subject = peers.build(IMPLEMENTATIONS[name], case, data)
    subject.name = name
    return subject


def _gradients(subject: Subject, y: Tensor, data: Data) -> tuple[Tensor, ...]:
    assert subject.module is not None
    wanted = (*data.inputs, *subject.module.parameters())
    return torch.autograd.grad(y, wanted, data.dy, retain_graph=True)


class Graph:
    """Calls of one implementation on sets in turn, captured; a sample is one replay."""

    def __init__(
        self, subject: Subject, sets: Inputs, case: Case, calls: int, flush: Callable[[], object]
    ) -> None:
        if case.operation not in ("forward", "backward", "eval"):
            raise ValueError(f"expected one pass, forward, backward or eval, but got {case.operation}")
        self.calls, self.flush = calls, flush
        order = [call % len(sets) for call in range(calls)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self.graph = torch.cuda.CUDAGraph()
        with backend(subject.name):
            # On the stream of the capture: backward runs on the stream of its forward.
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    y = subject.call(*sets[0].inputs)
                    if case.operation == "backward":
                        _gradients(subject, y, sets[0])
                if case.operation == "backward":
                    ready = [subject.call(*data.inputs) for data in sets]
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph, stream=stream):
                # Kept, so that no call writes to the memory of another's result.
                if case.operation == "backward":
                    self.kept = [(ready[i], _gradients(subject, ready[i], sets[i])) for i in order]
                else:
                    self.kept = [subject.call(*sets[i].inputs) for i in order]
        self.sample()

    def sample(self) -> float:
        """Seconds per call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / self.calls


def flusher(l2_bytes: int, device: str) -> Callable[[], object]:
    """Reads 1 GiB, or four L2 caches if they are larger."""
    buffer = torch.zeros(max(2**30, 4 * l2_bytes) // 4, device=device)
    return buffer.sum


def measure(graphs: dict[str, Graph]) -> dict[str, list[float]]:
    """A sample of each in an order drawn anew each round."""
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    names, order = list(graphs), random.Random(0)
    for _ in range(ROUNDS):
        order.shuffle(names)
        for name in names:
            seconds[name].append(graphs[name].sample())
    return seconds
