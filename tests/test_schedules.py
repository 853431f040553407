"""What depends on the machine: every instruction set that was compiled, and tensors larger than the caches."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bnext
from bits import assert_same_bits
from bnext.functional import batch_norm
from cases import BFLOAT16_WITH_FLOAT32, FLOAT32, FLOAT64, LAYOUT, Dtypes
from problem import Problem
from processors import RUNNABLE

ROOT = Path(__file__).resolve().parents[1]
BUILD = bnext.build_info()


def python(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"BNEXT_INSTRUCTION_SET": instruction_set}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("instruction_set", [name for name in RUNNABLE if name != BUILD["instruction_set"]])
def test_every_instruction_set(instruction_set: str) -> None:
    """The best one is what all other tests run; each of the others passes these, for planes and for rows."""
    chosen = python(instruction_set, "-c", "import bnext; print(bnext.build_info()['instruction_set'])")
    assert chosen.stdout.strip() == instruction_set, chosen.stderr
    files = [f"tests/test_{name}.py" for name in ("forward", "backward", "accuracy")]
    some = "(nchw- or nhwc-) and not sizes or every_16_bit_value"
    run = python(instruction_set, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", some, *files)
    assert run.returncode == 0, run.stdout[-3000:]


def test_unknown_instruction_set() -> None:
    run = python("x86-64-v9", "-c", "import bnext; bnext.build_info()")
    assert run.returncode != 0
    assert "BNEXT_INSTRUCTION_SET: expected one of" in run.stderr
    assert "got x86-64-v9" in run.stderr


def test_a_call_that_cannot_begin_counts_no_batch() -> None:
    call = (
        "import bnext, contextlib, torch; layer = bnext.BatchNorm1d(3)\n"
        "with contextlib.suppress(RuntimeError): print(layer(torch.randn(5, 3)))\n"
        "print(layer.num_batches_tracked.item())"
    )
    run = python("x86-64-v9", "-c", call)
    assert run.stdout.strip() == "0", run.stderr


# Bytes of x alone, so that x and y together are half as large again as the last-level cache. Beyond a gigabyte the
# test would need more memory than it is worth; the limit then tests the largest tensors that are.
LARGE_BYTES = min(max(3 * BUILD["shared_cache"] // 4, 1 << 22), 1 << 30)
# (C, H, W): planes and rows of whole cache lines, which streaming stores want, planes whose slabs are, and odd ones.
PLANES = [(64, 56, 56), (48, 16, 16), (48, 14, 14), (33, 31, 17)]


@pytest.mark.skipif(
    not BUILD["shared_cache"], reason="the system does not say how large the last-level cache is"
)
def test_streaming_stores_are_among_the_cases() -> None:
    """Without them the next test would prove less than it says."""
    plans = [
        bnext.plan((LARGE_BYTES // (4 * c * h * w), c, h, w), layout=layout, backward=backward)
        for c, h, w in PLANES
        for layout in ("contiguous", "channels_last")
        for backward in (False, True)
    ]
    assert {plan.streaming_stores for plan in plans} == {True, False}


def test_shared_cache_is_what_the_processors_may_count_on() -> None:
    """A virtual machine of two cores that reports 300 MB has nothing like it."""
    assert BUILD["shared_cache"] <= 32 * 2**20 * (os.cpu_count() or 1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tensors_that_fill_the_cache_are_fetched_ahead(dtype: torch.dtype, layout: str) -> None:
    last = max(BUILD["private_cache"], BUILD["shared_cache"])
    for training in (True, False):  # a step's other operators want their part, a host's other machines too
        alone = not training and not BUILD["cache_of_host"]
        float_rows = layout == "channels_last" and dtype == torch.float32
        room = last // 3 * 2 if not alone else last // 16 * 15 if float_rows else last
        fill = room // (2 * 64 * 144 * dtype.itemsize)  # images, read and written
        sizes = (1, fill // 2, fill, fill + 1, 2 * fill)
        plans = [bnext.plan((images, 64, 12, 12), dtype, layout, training=training) for images in sizes]
        assert [plan.beyond_cache for plan in plans] == [False, False, False, True, True]
        assert all(plan.beyond_cache for plan in plans if plan.streaming_stores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (32, 512, 28, 28),
        (32, 1024, 14, 14),
        (32, 2048, 7, 7),
        (64, 3, 100, 30),
        (4, 256, 56, 14),
        (1, 512, 28, 28),
        (1, 2048, 7, 7),
    ],
)
def test_inference_walks_memory_in_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whole runs, side by side for a megabyte, to the end of the channels, or as far as a sixteenth of the tensor."""
    plan = bnext.plan(shape, dtype, training=False)
    assert (plan.traversal, plan.schedule) == ("planes", "map")
    inner = shape[2] * shape[3]
    assert plan.chunks <= shape[0]
    side_by_side = plan.slab_channels * inner * dtype.itemsize
    assert plan.slab_channels == shape[1] or side_by_side >= min(
        1 << 20, math.prod(shape) * dtype.itemsize // 16
    )
    assert plan.slabs * plan.chunks >= 8


@pytest.mark.parametrize("backward", [False, True])
def test_few_images_have_no_rows_to_share_a_sum(backward: bool) -> None:
    traversals = [bnext.plan((images, 512, 7, 7), backward=backward).traversal for images in (1, 4, 5, 32)]
    assert traversals == ["planes", "planes", "rows", "rows"]


@pytest.mark.parametrize("backward", [False, True])
def test_many_runs_of_64_elements_are_rows(backward: bool) -> None:
    for dtype, most in ((torch.bfloat16, 16), (torch.float32, 128), (torch.float64, 512)):
        plans = [bnext.plan((images, 64, 8, 8), dtype, backward=backward) for images in (most, most + 1)]
        assert [plan.traversal for plan in plans] == ["planes", "rows"]
    assert bnext.plan((1024, 64, 8, 10), backward=backward).traversal == "planes"
    assert bnext.plan((1024, 64, 8, 8), training=False).traversal == "planes"  # nothing is summed


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 4096, 14, 14), (8, 2048, 28, 28), (8, 1024, 24, 24)])
def test_short_planes_are_written_in_whole_lines(
    shape: tuple[int, ...], dtype: torch.dtype, backward: bool
) -> None:
    """Runs that end within a cache line: slabs of several do not, so that large results can be streamed.

    A slab takes 100 KB at most, for which any machine has the cache.
    """
    plan = bnext.plan(shape, dtype, backward=backward)
    assert plan.traversal == "planes"
    assert plan.slab_channels * shape[2] * shape[3] * dtype.itemsize % 64 == 0
    assert plan.streaming_stores or not BUILD["shared_cache"] or plan.bytes_minimum < BUILD["shared_cache"]


def channel_of(x: Tensor, channel: int) -> Tensor:
    return x.detach()[:, channel : channel + 1].contiguous()


@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_larger_than_the_last_level_cache(layout: str, plane: tuple[int, int, int], dtypes: Dtypes) -> None:
    """Two channels are checked; all others hold the values of one of them and must have its bits in every result."""
    channels, height, width = plane
    batch = LARGE_BYTES // (channels * height * width * dtypes.input.itemsize)
    generator = torch.Generator().manual_seed(8)
    x, dy = (
        torch.randn(batch, 2, height, width, generator=generator)
        .to(dtypes.input)
        .repeat(1, channels // 2 + 1, 1, 1)
        for _ in range(2)
    )
    x, dy = (LAYOUT[layout].arrange(t[:, :channels]) for t in (x, dy))
    weight = torch.full((channels,), 0.75, dtype=dtypes.parameters, requires_grad=True)
    bias = torch.full((channels,), 0.5, dtype=dtypes.parameters, requires_grad=True)
    y = batch_norm(x.requires_grad_(), None, None, weight, bias, training=True)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    for channel in (0, 1):
        one = Problem(
            channel_of(x, channel),
            channel_of(dy, channel),
            weight[:1].detach(),
            bias[:1].detach(),
            None,
            None,
            True,
        )
        one.check_output(channel_of(y, channel))
        one.check_input_grad(channel_of(dx, channel))
        one.check_weight_grad(dweight[channel : channel + 1])
        one.check_bias_grad(dbias[channel : channel + 1])
    for result in (y.detach(), dx, dweight.view(1, -1), dbias.view(1, -1)):
        for channel in range(2, channels):
            assert torch.equal(result[:, channel], result[:, channel % 2]), channel


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_frozen_and_larger_than_the_last_level_cache(
    layout: str, plane: tuple[int, int, int], dtypes: Dtypes, residual: bool
) -> None:
    """By a mask, one example has the bits that it has by itself, and what passes is what y lets through."""
    channels, height, width = plane
    shape = (LARGE_BYTES // (channels * height * width * dtypes.input.itemsize), *plane)
    given = dict(training=False, backward=True, frozen=True, residual=residual, activation="relu")
    streams = bnext.plan(shape, dtypes.input, None, **given).streaming_stores
    assert streams or not BUILD["shared_cache"] or channels * height * width * dtypes.input.itemsize % 64
    generator = torch.Generator().manual_seed(9)
    layer = bnext.freeze(bnext.BatchNorm2d(channels, activation="relu", dtype=dtypes.parameters))
    torch.nn.init.uniform_(layer.weight, 0.5, 2)
    made = (torch.randn(shape, generator=generator).to(dtypes.input) for _ in range(2 + residual))
    dy, *inputs = (LAYOUT[layout].arrange(t) for t in made)

    def step(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
        y = layer(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    y, *grads = step(dy, *inputs)
    for example in (0, len(dy) // 2, len(dy) - 1):
        one = step(*(t[example : example + 1] for t in (dy, *inputs)))
        for whole, alone in zip((y, *grads), one, strict=True):
            assert torch.equal(whole[example : example + 1], alone)
    if residual:
        assert torch.equal(grads[1], dy.where(y > 0, torch.zeros_like(dy)))


@pytest.mark.skipif(not BUILD["shared_cache"], reason="there is no cache but a core's own")
def test_a_slab_reads_a_page_of_every_plane_where_the_last_cache_holds_it() -> None:
    """Half of it or more, so that threads have as many channels each."""
    run, images = 8 * 12 * 4, 1024
    widest = min(-(-4096 // run), BUILD["shared_cache"] // 2 // 2 // (run * images))
    plan = bnext.plan((images, 64, 8, 12), threads=2)
    assert plan.traversal == "planes" and 2 * plan.slab_channels >= widest


@pytest.mark.parametrize(
    "images,channels,schedule",
    [
        (64, 3, "split"),
        (64, 4, "fused"),
        (64, 5, "split"),
        (64, 32, "fused"),
        (6, 3, "fused"),
        (6, 5, "fused"),
    ],
)
def test_no_thread_is_left_idle_for_a_last_slab(images: int, channels: int, schedule: str) -> None:
    """Of several chunks: one alone would be shared out no better."""
    shape = (images, channels, 28, 28)
    plan = bnext.plan(shape, threads=2)
    assert plan.schedule == schedule and (plan.chunks > 1 or schedule == "fused")
    assert bnext.plan(shape, threads=1).schedule == "fused"


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize(
    ("plane", "active"), [(PLANES[0], "silu"), *((plane, "relu") for plane in PLANES)], ids=str
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_residuals_gradient_goes_out_while_sums_are_taken(
    layout: str, plane: tuple[int, int, int], active: str, dtypes: Dtypes
) -> None:
    """Where results are streamed. The other gradients have the bits that they have without it."""
    shape = (LARGE_BYTES // (math.prod(plane) * dtypes.input.itemsize), *plane)
    arranged = LAYOUT[layout].arrange
    generator = torch.Generator().manual_seed(10)
    x, residual, dy = (arranged(torch.randn(shape, generator=generator).to(dtypes.input)) for _ in range(3))
    plan = bnext.plan(x, backward=True, residual=True, activation=active)
    in_lines = layout == "nhwc" or (dtypes is FLOAT32 and plane[1] * plane[2] * x.itemsize % 64 == 0)
    assert plan.dresidual_first == (plan.streaming_stores and in_lines)
    layer = bnext.BatchNorm2d(plane[0], activation=active, dtype=dtypes.parameters)
    torch.nn.init.uniform_(layer.weight, 0.5, 2)
    y = layer(x.requires_grad_(), residual.requires_grad_())
    others = (x, layer.weight, layer.bias)
    *results, dresidual = torch.autograd.grad(y, (*others, residual), dy, retain_graph=True)
    assert_same_bits(results, torch.autograd.grad(y, others, dy))
    one = Problem(
        *map(channel_of, (x, dy), (0, 0)),
        layer.weight[:1].detach(),
        layer.bias[:1].detach(),
        None,
        None,
        True,
    )
    one.residual, one.activation = channel_of(residual, 0), active
    one.check_residual_grad(channel_of(dresidual, 0))
    if active == "relu":
        assert torch.equal(dresidual, torch.where(y > 0, dy, 0))
