"""What every test file shares: the devices this build can run on, threads put back after use, asserts that tell why."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from on_cuda import AVAILABLE, leave_without_device

DEVICES = ["cpu", "cuda"] if AVAILABLE else ["cpu"]

# Of what test files share: an assert that fails prints what it compared, as one of theirs does.
pytest.register_assert_rewrite(
    *{path.stem for path in Path(__file__).parent.glob("*.py")} - sys.modules.keys()
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        leave_without_device(f"{report.nodeid}\n{report.longreprtext}")
    return report


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
