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
    plan = bnext.plan(shape, torch.bfloat16, layout, training, backward, device=device)
    tensor = 2 * torch.Size(shape).numel()
    assert plan.engine == "streaming"
    assert plan.launches == (2 if training else 1)
    assert plan.bytes_minimum == (3 if backward else 2) * tensor
    assert plan.bytes_minimum <= plan.bytes_moved <= (5 if backward else 3) * tensor
    assert plan.floor_seconds == pytest.approx(plan.bytes_minimum / device.bandwidth)
    assert 132 <= plan.map_blocks < 2**31 and plan.map_threads % 32 == 0


def test_a_larger_device_gets_more_blocks() -> None:
    blocks = [
        bnext.plan((1 << 20, 64), device=bnext.CudaDevice(multiprocessors, 1e12, 1 << 22)).reduce_blocks
        for multiprocessors in (1, 10, 100)
    ]
    assert blocks == sorted(set(blocks))


def test_what_no_device_has_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 multiprocessor"):
        bnext.CudaDevice(0, 1e12, 0)
    with pytest.raises(ValueError, match="expected threads with the CPU only"):
        bnext.plan((3, 4), threads=2, device=bnext.CudaDevice(1, 1e12, 0))
    with pytest.raises(ValueError, match="expected device cpu, cuda or a CudaDevice"):
        bnext.plan((3, 4), device="meta")
