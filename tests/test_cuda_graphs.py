"""Calls in CUDA graphs: the same bits as eager calls, on fresh inputs, with state that moves at each replay.

Nothing of a call may live on the host between capture and replay, and nothing on the device may be shared between
graphs that run at the same time.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bits import RESULTS, assert_same_bits
from cases import BFLOAT16_WITH_FLOAT32, FLOAT32, Dtypes
from on_cuda import STEP_IDS, STEPS, Captured, make_step, needs_cuda

pytestmark = needs_cuda

ROOT = Path(__file__).resolve().parents[1]
STATE = RESULTS[4:]


@pytest.mark.parametrize(("layout", "dtypes", "shape"), STEPS, ids=STEP_IDS)
def test_step(layout: str, dtypes: Dtypes, shape: tuple[int, ...]) -> None:
    step = make_step(layout, dtypes, shape)
    captured = Captured(step)
    eager = step.twin()
    for seed in range(1, 4):
        step.load(seed)
        eager.load(seed)
        captured.replay()
        assert_same_bits(captured.outputs, eager())
        assert_same_bits(step.state(), eager.state(), STATE)
    assert int(step.layer.num_batches_tracked) == 1 + 3  # the call before the capture, and three replays


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("layout", "dtypes", "shape"), STEPS, ids=STEP_IDS)
def test_forward(layout: str, dtypes: Dtypes, shape: tuple[int, ...], training: bool) -> None:
    step = make_step(layout, dtypes, shape)
    step()  # running statistics that are not 0 and 1
    step.layer.train(training)
    captured = Captured(step.forward)
    eager = step.twin()
    for seed in range(1, 4):
        step.load(seed)
        eager.load(seed)
        captured.replay()
        assert_same_bits(captured.outputs, eager.forward())
        assert_same_bits(step.state(), eager.state(), STATE)
    assert int(step.layer.num_batches_tracked) == 1 + (1 + 3) * training


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("layout", "dtypes", "shape"), STEPS, ids=STEP_IDS)
def test_backward(layout: str, dtypes: Dtypes, shape: tuple[int, ...], training: bool) -> None:
    """Of a forward that was not captured; on its stream, for that is where backward runs."""
    step = make_step(layout, dtypes, shape)
    step.layer.train(training)
    eager = step.twin()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = step.layer(step.x)
    captured = Captured(lambda: step.backward(y), stream)
    expected = eager.layer(eager.x)
    for seed in range(1, 4):
        step.load(seed, "dy")
        eager.load(seed, "dy")
        captured.replay()
        assert_same_bits(captured.outputs, eager.backward(expected), RESULTS[1:])


@pytest.mark.parametrize(("layout", "dtypes", "shape"), STEPS, ids=STEP_IDS)
def test_a_stream_that_forks_within_the_capture(layout: str, dtypes: Dtypes, shape: tuple[int, ...]) -> None:
    """Kernels that begin before the one in front of them has ended leave edges of their own in a graph."""
    step = make_step(layout, dtypes, shape)
    beside = torch.cuda.Stream()

    def forked() -> list[torch.Tensor]:
        main = torch.cuda.current_stream()
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            outputs = step()
        main.wait_stream(beside)
        return outputs

    captured, eager = Captured(forked), step.twin()
    step.load(1)
    eager.load(1)
    captured.replay()
    assert_same_bits(captured.outputs, eager())
    assert_same_bits(step.state(), eager.state(), STATE)


def test_cumulative_average() -> None:
    """momentum=None reads the counter on the device, and so moves on with each replay."""
    step = make_step("nchw", FLOAT32, (8, 19, 9, 11))
    step.layer.momentum = None
    captured = Captured(step)
    eager = step.twin()
    for seed in range(1, 5):
        step.load(seed)
        eager.load(seed)
        captured.replay()
        eager()
        assert_same_bits(step.state(), eager.state(), STATE)


# Captures before anything of bnext ran in the process: what a first call prepares must be prepared inside a capture.
FIRST_CALL = """
import torch
import bnext

layer = bnext.BatchNorm2d(65, device="cuda")
x = torch.randn(16, 65, 29, 31, device="cuda"){layout}.requires_grad_()
dy = torch.randn_like(x)

def step():
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

torch.ones(1, device="cuda", requires_grad=True).mul(2).backward()  # torch's own first steps
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
assert int(layer.num_batches_tracked) == 0
for _ in range(3):
    graph.replay()
torch.cuda.synchronize()
assert int(layer.num_batches_tracked) == 3
for name, one, other in zip(("y", "dx", "dweight", "dbias"), captured, step(), strict=True):
    assert torch.equal(one, other), name
print("same bits")
"""


@pytest.mark.parametrize(
    "layout", ["", ".contiguous(memory_format=torch.channels_last)"], ids=["nchw", "nhwc"]
)
def test_the_first_call_of_a_process(layout: str) -> None:
    code = FIRST_CALL.replace("{layout}", layout)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "same bits"


# Of the same shape, which would share whatever is kept per shape, and of others.
PAIRS = [
    (("nchw", FLOAT32, (32, 64, 28, 28)), ("nchw", FLOAT32, (32, 64, 28, 28))),
    (("nhwc", BFLOAT16_WITH_FLOAT32, (32, 128, 28, 28)), ("nhwc", BFLOAT16_WITH_FLOAT32, (32, 128, 28, 28))),
    (("nc", FLOAT32, (4099, 257)), ("nchw", FLOAT32, (64, 130, 7, 7))),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(f"{layout}" for layout, _, _ in pair))
def test_two_graphs(pair: tuple[tuple[str, Dtypes, tuple[int, ...]], ...]) -> None:
    """One after the other in any order, then at once on two streams, and beside them eager calls on a third."""
    steps = [make_step(*case) for case in pair]
    graphs = [Captured(step) for step in steps]
    twins = [step.twin() for step in steps]
    for seed, (step, twin) in enumerate(zip(steps, twins, strict=True), start=7):
        step.load(seed)
        twin.load(seed)
    other = make_step(*pair[0])
    alone = other.twin()()
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()

    interleaved = (0, 1, 0, 0, 1)
    for which in interleaved:
        graphs[which].replay()
    torch.cuda.synchronize()
    beside = []
    for _ in range(25):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        beside.append(other())
    torch.cuda.synchronize()

    for which, (step, twin, graph) in enumerate(zip(steps, twins, graphs, strict=True)):
        for _ in range(interleaved.count(which) + 25):
            expected = twin()
        assert_same_bits(graph.outputs, expected)
        assert_same_bits(step.state(), twin.state(), STATE)
    for outputs in beside:
        assert_same_bits(outputs, alone)
