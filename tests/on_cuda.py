"""What the tests of a GPU share: when they run, a training step on static tensors, calls captured in CUDA graphs."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import bnext
from cases import BFLOAT16, BFLOAT16_WITH_FLOAT32, FLOAT16_WITH_FLOAT32, FLOAT32, FLOAT64, LAYOUT, Dtypes

AVAILABLE = torch.cuda.is_available() and bool(bnext.build_info()["cuda"])
DEVICE = "cuda"
LOST_DEVICE = 3  # exit code


def leave_without_device(failure: str) -> None:
    """Ends a worker of pytest-xdist whose CUDA context is lost, for an error there is every later test's: another
    worker takes its place, and the test counts as one that crashed."""
    if not (AVAILABLE and "PYTEST_XDIST_WORKER" in os.environ):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{failure}\nthe device is lost: {error}", file=sys.__stderr__, flush=True)
        os._exit(LOST_DEVICE)


needs_cuda = pytest.mark.skipif(
    not AVAILABLE, reason="needs a GPU, a CUDA build of torch, and bnext built with CUDA"
)

# On an H100 or H200 blocks share slabs of these: clusters forward and waiting blocks backward; waiting blocks.
SHARED: list[tuple[str, Dtypes, tuple[int, ...]]] = [
    ("nchw", FLOAT32, (64, 64, 56, 56)),
    ("nhwc", BFLOAT16_WITH_FLOAT32, (64, 256, 56, 56)),
]
# Every layout and dtype; sizes that no vector width divides, and sizes of more than one block in each direction.
STEPS: list[tuple[str, Dtypes, tuple[int, ...]]] = [
    ("nchw", FLOAT32, (8, 19, 9, 11)),
    ("nchw", BFLOAT16_WITH_FLOAT32, (16, 64, 56, 56)),
    ("nhwc", FLOAT16_WITH_FLOAT32, (8, 19, 9, 11)),
    ("nhwc", BFLOAT16_WITH_FLOAT32, (32, 128, 28, 28)),
    ("nchw", BFLOAT16, (64, 130, 7, 7)),
    ("nhwc", FLOAT64, (4, 33, 17, 15)),
    ("nc", FLOAT32, (301, 130)),
    ("nc", BFLOAT16_WITH_FLOAT32, (4099, 257)),
    *SHARED,
]
STEP_IDS = [f"{layout}-{dtypes}-{'x'.join(map(str, shape))}" for layout, dtypes, shape in STEPS]


@dataclass
class Step:
    """A training step of one layer: forward and backward on x and dy, which stay where they are."""

    layer: bnext.BatchNorm1d | bnext.BatchNorm2d
    x: Tensor
    dy: Tensor

    def __call__(self) -> list[Tensor]:
        """y, dx, dweight, dbias."""
        y = self.layer(self.x)
        return [y.detach(), *self.backward(y)]

    def forward(self) -> list[Tensor]:
        return [self.layer(self.x).detach()]

    def backward(self, y: Tensor) -> list[Tensor]:
        leaves = [self.x, self.layer.weight, self.layer.bias]
        return list(torch.autograd.grad(y, leaves, self.dy, retain_graph=True))

    def load(self, seed: int, *names: str) -> None:
        """Fresh values for x and dy, or for the named of them, in place."""
        for name in names or ("x", "dy"):
            tensor = getattr(self, name)
            generator = torch.Generator(tensor.device).manual_seed(2 * seed + (name == "dy"))
            values = torch.randn(tensor.shape, generator=generator, device=tensor.device)
            with torch.no_grad():
                tensor.copy_(values * (seed + 1) + 0.5)

    def state(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.layer.buffers()]

    def twin(self) -> Step:
        """The same values and state in memory of its own."""
        x, dy = (torch.empty_like(tensor).copy_(tensor.detach()) for tensor in (self.x, self.dy))
        return Step(copy.deepcopy(self.layer), x.requires_grad_(), dy)


def make_step(layout: str, dtypes: Dtypes, shape: tuple[int, ...], device: str = DEVICE) -> Step:
    generator = torch.Generator().manual_seed(3)
    kind = bnext.BatchNorm1d if len(shape) == 2 else bnext.BatchNorm2d
    layer = kind(shape[1], device=device, dtype=dtypes.parameters)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(shape[1], generator=generator) + 0.5)
        layer.bias.copy_(torch.randn(shape[1], generator=generator))
    x, dy = (LAYOUT[layout].arrange(torch.empty(shape, dtype=dtypes.input, device=device)) for _ in range(2))
    step = Step(layer, x.requires_grad_(), dy)
    step.load(0)
    return step


class Captured:
    """A function in a CUDA graph. `outputs` are written anew by each replay.

    The call before the capture runs for real and moves the state; the capture itself runs nothing.
    """

    def __init__(self, function: Callable[[], list[Tensor]], stream: torch.cuda.Stream | None = None) -> None:
        stream = stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.outputs = function()

    def replay(self) -> None:
        self.graph.replay()
