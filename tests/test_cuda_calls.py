"""How a call behaves on a GPU: its stream, its device, what it launches, what it waits for, what memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import bnext
from bits import RESULTS, assert_same_bits
from bnext.functional import batch_norm
from cases import BFLOAT16_WITH_FLOAT32, FLOAT32, Dtypes
from on_cuda import DEVICE, SHARED, STEP_IDS, STEPS, Step, make_step, needs_cuda

pytestmark = needs_cuda

STATE = RESULTS[4:]
# Long enough that whoever waits for it is noticed, and that the host has enqueued a step meanwhile: 50 ms at 2 GHz.
SLEEP_CYCLES = 100_000_000
ALIGNMENT = 512  # of torch's allocator: every tensor is rounded up to it


@pytest.mark.parametrize(("layout", "dtypes", "shape"), STEPS, ids=STEP_IDS)
def test_same_bits_from_run_to_run(layout: str, dtypes: Dtypes, shape: tuple[int, ...]) -> None:
    step = make_step(layout, dtypes, shape)
    twins = [step.twin() for _ in range(4)]
    first = step()
    for twin in twins:
        assert_same_bits(twin(), first)
        assert_same_bits(twin.state(), step.state(), STATE)


@pytest.mark.parametrize(("layout", "dtypes", "shape"), STEPS, ids=STEP_IDS)
def test_runs_on_the_current_stream(layout: str, dtypes: Dtypes, shape: tuple[int, ...]) -> None:
    """Its input is written late, on a stream of its own: on any other stream the call would see the old values."""
    step = make_step(layout, dtypes, shape)
    step()
    eager, fresh = step.twin(), step.twin()
    for late in (eager, fresh):
        late.load(5)
    expected = eager()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        with torch.no_grad():
            step.x.copy_(fresh.x)
            step.dy.copy_(fresh.dy)
        outputs = step()
    torch.cuda.synchronize()
    assert_same_bits(outputs, expected)
    assert_same_bits(step.state(), eager.state(), STATE)


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_blocks_that_wait_beside_a_long_kernel(case: tuple[str, Dtypes, tuple[int, ...]]) -> None:
    """It holds a place on the device all the while: blocks that wait for each other start together or not yet."""
    step = make_step(*case)
    expected = step.twin()()
    step()
    long = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(long):
        torch.cuda._sleep(SLEEP_CYCLES)
    with torch.cuda.stream(torch.cuda.Stream()):
        outputs = [step() for _ in range(10)]
    torch.cuda.synchronize()
    for found in outputs:
        assert_same_bits(found, expected)


@pytest.mark.parametrize("case", [STEPS[1], STEPS[3], STEPS[4], STEPS[7], SHARED[0]], ids=str)
def test_two_streams_at_once(case: tuple[str, Dtypes, tuple[int, ...]]) -> None:
    """Many calls of the same shape beside each other: nothing that a call keeps on the device is another's."""
    steps = [make_step(*case) for _ in range(2)]
    steps[1].load(9)
    twins = [step.twin() for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    outputs: list[list[list[Tensor]]] = [[], []]
    for _ in range(40):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[which].append(steps[which]())
    torch.cuda.synchronize()
    for which, twin in enumerate(twins):
        for _ in range(40):
            expected = twin()
        for found in outputs[which]:
            assert_same_bits(found, expected)
        assert_same_bits(steps[which].state(), twin.state(), STATE)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize(("layout", "dtypes", "shape"), STEPS, ids=STEP_IDS)
def test_the_host_never_waits(
    layout: str, dtypes: Dtypes, shape: tuple[int, ...], momentum: float | None
) -> None:
    """Neither through torch, which would say so, nor past it: the call is over before what was enqueued earlier."""
    step = make_step(layout, dtypes, shape)
    step.layer.momentum = momentum
    for training in (True, False, True, False):  # the allocator has its blocks, the kernels are loaded
        step.layer.train(training)
        step()
    torch.cuda.synchronize()
    asleep = torch.cuda.Event()
    torch.cuda._sleep(SLEEP_CYCLES)
    asleep.record()
    with waiting_is_an_error():
        for training in (True, False):
            step.layer.train(training)
            step()
    assert not asleep.query(), "forward or backward waited for the device"


def kernels(call: Callable[[], object]) -> list[str]:
    """Names of everything the device did, memory operations among it."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
        torch.cuda.synchronize()
    return [event.name for event in found.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nc"])
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
def test_launches_of_a_call(layout: str, dtypes: Dtypes, training: bool) -> None:
    """At most two kernels each for forward, the counter included, and backward; no copies and no memsets."""
    if not kernels(lambda: torch.ones(5, device=DEVICE)):
        pytest.skip("torch's profiler sees no kernels on this machine")
    shape = (4099, 257) if layout == "nc" else (32, 64, 28, 28)
    step = make_step(layout, dtypes, shape)
    step.layer.train(training)
    y = step.layer(step.x)
    for part, call in {"forward": lambda: step.layer(step.x), "backward": lambda: step.backward(y)}.items():
        found = kernels(call)
        assert 1 <= len(found) <= (2 if training or part == "backward" else 1), (part, found)
        assert all("bnext" in name for name in found), (part, found)


def rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_memory_of_a_step(layout: str) -> None:
    """Kept for backward besides x and y: the statistics with weight and bias, 32 bytes per channel."""
    channels = 64
    step = make_step(layout, FLOAT32, (64, channels, 64, 64))
    step()
    tensor_bytes = step.x.numel() * 4
    scratch = tensor_bytes // 8  # partial sums: far less than any copy of a tensor
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = step.layer(step.x)
    torch.cuda.synchronize()
    kept = rounded(tensor_bytes) + rounded(4 * channels * 8)
    assert torch.cuda.memory_allocated() - before <= kept
    assert torch.cuda.max_memory_allocated() - before <= kept + scratch
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(y, [step.x, step.layer.weight, step.layer.bias], step.dy)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= kept + tensor_bytes + scratch
    del y
    made = sum(rounded(gradient.numel() * 4) for gradient in gradients)
    assert torch.cuda.memory_allocated() - before <= made


def arguments(device: str) -> dict[str, Tensor]:
    return {
        "x": torch.randn(4, 3, 2, device=device),
        "running_mean": torch.zeros(3, device=device),
        "running_var": torch.ones(3, device=device),
        "weight": torch.ones(3, device=device),
        "bias": torch.zeros(3, device=device),
        "num_batches_tracked": torch.tensor(0, device=device),
    }


def call(given: dict[str, Tensor]) -> Tensor:
    named = dict(given)
    positional = [named.pop(name) for name in ("x", "running_mean", "running_var", "weight", "bias")]
    return batch_norm(*positional, True, **named)


@pytest.mark.parametrize("home", [DEVICE, "cpu"])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias", "num_batches_tracked"])
def test_an_argument_on_another_device(name: str, home: str) -> None:
    given = arguments(home)
    given[name] = arguments("cpu" if home == DEVICE else DEVICE)[name]
    with pytest.raises(RuntimeError, match=f"expected {name} on the input's device {home}"):
        call(given)
    assert int(given["num_batches_tracked"]) == 0
    assert not given["running_mean"].any()


@pytest.mark.parametrize("home", [DEVICE, "cpu"])
@pytest.mark.parametrize("name", ["dy", "weight", "bias", "stats"])
def test_an_argument_of_backward_on_another_device(name: str, home: str) -> None:
    x = torch.randn(4, 3, 2, device=home)
    stats = torch.ones(2, 3, dtype=torch.float64, device=home)
    vector = torch.ones(3, device=home)
    given = {"dy": x.clone(), "x": x, "residual": None, "mask": None, "weight": vector, "bias": vector}
    given["stats"] = stats
    given[name] = given[name].to("cpu" if home == DEVICE else DEVICE)
    with pytest.raises(RuntimeError, match=f"expected {name} on the input's device {home}"):
        torch.ops.bnext.batch_norm_backward(
            *given.values(), True, None, None, False, [True, True, True, False]
        )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", [0, 1])
def test_the_inputs_device_counts(current: int) -> None:
    """Whatever the current device: the results of both are the same, and the current device stays what it was."""
    expected = make_step("nhwc", FLOAT32, (8, 19, 9, 11), "cuda:0")()
    with torch.cuda.device(current):
        for device in ("cuda:0", "cuda:1"):
            step: Step = make_step("nhwc", FLOAT32, (8, 19, 9, 11), device)
            outputs = step()
            assert all(output.device == torch.device(device) for output in outputs)
            assert_same_bits([output.to("cuda:0") for output in outputs], expected)
            assert torch.cuda.current_device() == current


def test_the_build_says_so() -> None:
    assert bnext.build_info()["cuda"] is True


@pytest.mark.parametrize("spare", ["-1", "8x", "", "100000"])
def test_spare_multiprocessors_are_a_number_of_those_there_are(spare: str) -> None:
    code = "import bnext, torch; bnext.BatchNorm1d(3, device='cuda')(torch.ones(4, 3, device='cuda'))"
    environment = os.environ | {"BNEXT_CUDA_SPARE": spare}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    expected = "BNEXT_CUDA_SPARE: expected a number of multiprocessors from 0 to"
    assert "ValueError" in done.stderr and expected in done.stderr, done.stderr[-2000:]
    assert f"but got {spare}\n" in done.stderr
