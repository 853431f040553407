"""Fixtures that every test file shares: the devices this build can run on, and threads put back after use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from on_cuda import AVAILABLE

DEVICES = ["cpu", "cuda"] if AVAILABLE else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors of the test live."""
    return str(request.param)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """For tests that call `torch.set_num_threads`."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """For tests that call `torch.compile`: nothing compiled before, and nothing left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
