"""The measurements on a GPU with the CPU in its place: each variant is validated, built and called as it would be."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import bench, results, timing
from benchmarks.shapes import VARIANTS, Case


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a graph would have captured runs at once; a replay is noted here."""
    found: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 1.0)
    stubs: dict[str, Any] = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: found.append("replay")),
        "graph": lambda graph, stream: nullcontext(),
        "Event": lambda enable_timing: event,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(timing, "flusher", lambda l2_bytes, device: lambda: found.append("flush"))
    return found


@pytest.mark.parametrize("operation", ["forward", "backward", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, operation: str, calls: list[str]) -> None:
    case = Case("some", operation, (8, 16, 4, 4), "bfloat16", "channels_last", variant=variant)
    measuring = bench.Bench("cpu", l2_bytes=1 << 12, run=results.Run(), save=lambda: None)
    result = measuring.case(case, ("bnext", "native", "cudnn"))
    assert measuring.failures == []
    assert set(result.seconds) == {"bnext", "native"} and result.notes == {"cudnn": "native"}
    assert all(len(rounds) == timing.ROUNDS for rounds in result.seconds.values())
    samples = 2 * (timing.ROUNDS + 1)  # one of each is not counted
    assert calls == ["flush", "replay"] * samples
    assert measuring.run.find(case) is result


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_call_has_tensors_of_its_own(variant: str) -> None:
    case = Case("some", "backward", (8, 16, 4, 4), "bfloat16", "channels_last", variant=variant)
    sets = timing.inputs(case, 3, "cpu")
    tensors = [tensor for data in sets for tensor in (*data.inputs, data.dy)]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors) == 3 * (2 + case.residual)
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
    assert all(tensor.requires_grad for data in sets for tensor in data.inputs)
