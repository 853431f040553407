"""Plans for a GPU, made from a description of it: no GPU is asked."""

from __future__ import annotations

import pytest
import torch

import bnext


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_plan_needs_no_gpu(layout: str, training: bool, backward: bool) -> None:
    device = bnext.CudaDevice(multiprocessors=132, bandwidth=4.8e12, l2=50 << 20, shared_memory=227 << 10)
    shape = (128, 256, 56, 56)
    plan = bnext.plan(shape, torch.bfloat16, layout, training, backward, device=device, engine="streaming")
    tensor = 2 * torch.Size(shape).numel()
    assert plan.engine == "streaming"
    assert plan.launches == (2 if training else 1)
    assert plan.bytes_minimum == (3 if backward else 2) * tensor
    assert plan.bytes_minimum <= plan.bytes_moved <= (5 if backward else 3) * tensor
    assert plan.floor_seconds == pytest.approx(plan.bytes_minimum / device.bandwidth)
    blocks, threads = max((plan.map_blocks, plan.map_threads), (plan.reduce_blocks, plan.reduce_threads))
    assert 132 <= blocks < 2**31 and threads % 32 == 0


def test_a_larger_device_gets_more_blocks() -> None:
    blocks = [
        bnext.plan(
            (1 << 20, 64), device=bnext.CudaDevice(multiprocessors, 1e12, 1 << 22), engine="streaming"
        ).reduce_blocks
        for multiprocessors in (1, 10, 100)
    ]
    assert blocks == sorted(set(blocks))


# An H100 or H200, as far as plans ask.
HOPPER = bnext.CudaDevice(
    132,
    4.8e12,
    l2=50 << 20,
    shared_memory=227 << 10,
    multiprocessor_memory=228 << 10,
    cluster_blocks=8,
    bulk_copies=True,
    early_launches=True,
)
# The same before compute capability 9.0.
NO_CLUSTERS = bnext.CudaDevice(
    132, 4.8e12, l2=50 << 20, shared_memory=227 << 10, multiprocessor_memory=228 << 10
)

# Shape, layout, dtype, backward; engine. On an H200 one block alone mostly gains by keeping a slab, several lose.
CHOICES = [
    ((32, 512), "contiguous", torch.float16, False, "resident"),
    ((256, 2048), "contiguous", torch.float16, True, "resident"),
    ((32, 512, 7, 7), "contiguous", torch.float16, False, "resident"),
    ((32, 256, 14, 14), "contiguous", torch.float32, True, "resident"),
    ((256, 64, 56, 56), "contiguous", torch.float32, False, "streaming"),
    ((256, 64, 56, 56), "contiguous", torch.float32, True, "streaming"),
    ((128, 512, 28, 28), "channels_last", torch.bfloat16, False, "streaming"),
    ((32, 256, 28, 28), "channels_last", torch.bfloat16, False, "streaming"),
    ((256, 64, 112, 112), "channels_last", torch.bfloat16, False, "streaming"),  # nothing holds it
    ((1 << 20, 64), "contiguous", torch.float32, True, "streaming"),
    ((64, 1001), "contiguous", torch.float32, False, "streaming"),  # odd and wide: element by element
    ((32, 512), "contiguous", torch.float64, False, "streaming"),
]


@pytest.mark.parametrize("shape,layout,dtype,backward,engine", CHOICES)
@pytest.mark.parametrize("device", [HOPPER, NO_CLUSTERS], ids=["clusters", "no clusters"])
def test_the_plan_chooses_and_says_why(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    backward: bool,
    engine: str,
    device: bnext.CudaDevice,
) -> None:
    plan = bnext.plan(shape, dtype, layout, backward=backward, device=device)
    assert (plan.engine, plan.launches) == (engine, 1 + (engine == "streaming"))
    assert (plan.cluster, plan.waiting_blocks) == (1, 0)
    assert device is HOPPER or not plan.bulk_copies
    assert plan.early_map == (device is HOPPER and engine == "streaming")
    assert len(plan.why) > 10
    if engine == "resident":
        assert plan.bytes_moved == plan.bytes_minimum


@pytest.mark.parametrize(
    "shape,layout,dtype,backward,cluster,waits,bulk",
    [
        ((32, 512, 7, 7), "channels_last", torch.bfloat16, False, 7, False, False),
        ((32, 512, 7, 7), "channels_last", torch.bfloat16, True, 8, False, False),  # a small tensor
        ((32, 256, 56, 56), "contiguous", torch.float32, False, 4, False, True),
        ((32, 256, 56, 56), "contiguous", torch.float32, True, 8, False, True),
        ((32, 256, 14, 14), "contiguous", torch.float32, True, 1, False, True),  # a block has room enough
        (
            (32, 64, 112, 112),
            "contiguous",
            torch.float32,
            False,
            1,
            True,
            True,
        ),  # more than eight share a slab
        ((128, 512, 28, 28), "channels_last", torch.bfloat16, False, 1, True, False),
    ],
)
def test_eight_blocks_at_most_are_a_cluster(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    backward: bool,
    cluster: int,
    waits: bool,
    bulk: bool,
) -> None:
    plan = bnext.plan(shape, dtype, layout, backward=backward, device=HOPPER, engine="resident")
    assert plan.engine == "resident" and plan.launches == 1
    assert (plan.cluster, plan.waiting_blocks > 0, plan.bulk_copies) == (cluster, waits, bulk)
    assert plan.reduce_blocks % cluster == 0
    assert f"cluster={cluster}, bulk_copies={bulk}, early_map=False" in repr(plan)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_blocks_that_wait_fit_the_device(layout: str, dtype: torch.dtype, backward: bool, spare: int) -> None:
    """By shared memory, 128 bytes of the kernel's own and 1024 of CUDA's to a block; by threads and registers two
    blocks of 256 fit every multiprocessor there is."""
    waiting = 0
    for multiprocessors, block, all_blocks in ((132, 227, 228), (108, 163, 164), (82, 99, 100), (40, 64, 64)):
        device = bnext.CudaDevice(
            multiprocessors,
            1e12,
            l2=0,
            shared_memory=block << 10,
            multiprocessor_memory=all_blocks << 10,
            spare_multiprocessors=spare,
        )
        for outer in (1, 30, 1000):
            for channels in (3, 64, 1000):
                for inner in (1, 7, 28, 56):
                    shape = (outer, channels, inner, inner)
                    try:
                        plan = bnext.plan(
                            shape, dtype, layout, backward=backward, device=device, engine="resident"
                        )
                    except ValueError as refused:
                        assert "expected a call that the resident engine takes" in str(refused)
                        continue
                    assert plan.block_memory + 128 <= block << 10 and plan.reduce_threads <= 256
                    if plan.waiting_blocks:
                        waiting += 1
                        together = min(2, (all_blocks << 10) // (plan.block_memory + 128 + 1024))
                        assert plan.waiting_blocks == plan.reduce_blocks
                        assert plan.waiting_blocks <= (multiprocessors - spare) * together
                        assert together == 1 or not spare  # two to each would be spread over all
    assert waiting > 10


def test_an_engine_can_be_asked_for() -> None:
    shape = (32, 256, 28, 28)
    for engine in ("streaming", "resident"):
        plan = bnext.plan(shape, torch.bfloat16, "channels_last", device=HOPPER, engine=engine)
        assert (plan.engine, plan.why) == (engine, "asked for")
    assert bnext.plan(shape, training=False, device=HOPPER, engine="resident").engine == "streaming"
    with pytest.raises(ValueError, match="float64 streams"):
        bnext.plan(shape, torch.float64, device=HOPPER, engine="resident")
    with pytest.raises(ValueError, match="expected engine automatic, streaming or resident, but got fast"):
        bnext.plan(shape, device=HOPPER, engine="fast")
    with pytest.raises(ValueError, match="expected engine with a GPU only"):
        bnext.plan(shape, engine="resident")


def test_what_no_device_has_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 multiprocessor"):
        bnext.CudaDevice(0, 1e12, 0)
    with pytest.raises(ValueError, match="cluster_blocks from 1"):
        bnext.CudaDevice(1, 1e12, 0, cluster_blocks=0)
    with pytest.raises(ValueError, match="expected threads with the CPU only"):
        bnext.plan((3, 4), threads=2, device=bnext.CudaDevice(1, 1e12, 0))
    with pytest.raises(ValueError, match="expected device cpu, cuda or a CudaDevice"):
        bnext.plan((3, 4), device="meta")


@pytest.mark.parametrize("cluster", [1, 8])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_multiprocessor_is_left(layout: str, cluster: int) -> None:
    """Few slabs that take long share multiprocessors only where there are some."""
    device = bnext.CudaDevice(
        108,
        1.5e12,
        l2=40 << 20,
        shared_memory=163 << 10,
        multiprocessor_memory=164 << 10,
        cluster_blocks=cluster,
        spare_multiprocessors=107,
    )
    for channels in (1, 2, 8, 300):
        plan = bnext.plan((8, channels, 64, 64), layout=layout, device=device)
        assert plan.reduce_blocks > 0 and plan.waiting_blocks <= 2


@pytest.mark.parametrize("engine", [None, "streaming"])
@pytest.mark.parametrize("shape", [(64, 64, 7, 7), (8, 3, 64, 64), (0, 4)], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_only_kernels_that_are_launched_have_blocks(
    backward: bool, training: bool, shape: tuple[int, ...], engine: str | None
) -> None:
    plan = bnext.plan(shape, training=training, backward=backward, device=HOPPER, engine=engine)
    kernels = {
        name: (getattr(plan, f"{name}_blocks"), getattr(plan, f"{name}_threads"))
        for name in ("reduce", "map")
    }
    assert plan.launches == sum(blocks > 0 for blocks, _ in kernels.values())
    assert all((blocks > 0) == (threads > 0) for blocks, threads in kernels.values())
