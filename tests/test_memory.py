"""Blocks of large outputs: reused, limited, given back, and never shared by two tensors that live."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bnext

LARGE = (4, 16, 160, 160)  # 6.6 MB of float32
SMALL = (4, 16, 16, 16)
BLOCK = 8 << 20  # what LARGE takes: whole huge pages of 2 MB


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    bnext.memory.empty_cache()
    yield
    bnext.memory.set_limit(1 << 40)
    bnext.memory.empty_cache()


def output(shape: tuple[int, ...] = LARGE, value: float = 1.0) -> Tensor:
    """A tensor of that shape from the operator; its elements are all 0 or 1."""
    x = torch.full(shape, value)
    return bnext.functional.batch_norm(x, torch.zeros(16), torch.ones(16), eps=0.0)


def test_a_freed_block_is_used_again() -> None:
    first = output()
    address = first.data_ptr()
    assert bnext.memory.cached_bytes() == 0
    del first
    assert bnext.memory.cached_bytes() == BLOCK
    assert output().data_ptr() == address


def test_a_view_keeps_the_block() -> None:
    part = output()[1:2, 3]
    assert bnext.memory.cached_bytes() == 0
    other = output(value=0.0)
    assert bool((part == 1).all()) and bool((other == 0).all())


def test_small_outputs_are_torchs_own() -> None:
    output(SMALL)
    assert bnext.memory.cached_bytes() == 0


MAPS = Path("/proc/self/smaps_rollup")
tells_lazily_free = pytest.mark.skipif(not MAPS.exists(), reason=f"{MAPS} is of Linux 4.14 and later")


def lazily_free() -> int:
    """Kilobytes of this process that the system may take back."""
    text = MAPS.read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("LazyFree"))


@tells_lazily_free
def test_few_freed_blocks_are_kept_as_they_are() -> None:
    """To offer their pages to the system takes as long as the next call."""
    before = lazily_free()
    y = output()
    del y
    assert bnext.memory.cached_bytes() > 0
    assert lazily_free() == before


@tells_lazily_free
def test_the_others_are_offered_to_the_system() -> None:
    """More than a quarter of the limit."""
    bnext.memory.set_limit(2 * BLOCK)
    before = lazily_free()
    y = output()
    del y
    assert lazily_free() > before


def test_empty_cache_says_how_much_it_gave_back() -> None:
    output()
    assert bnext.memory.empty_cache() == BLOCK
    assert bnext.memory.cached_bytes() == bnext.memory.empty_cache() == 0


def test_the_limit_holds_at_once_and_later() -> None:
    kept = [output(), output()]
    kept.clear()
    assert bnext.memory.cached_bytes() == 2 * BLOCK
    bnext.memory.set_limit(BLOCK)
    assert bnext.memory.cached_bytes() <= BLOCK
    kept = [output(), output()]
    kept.clear()
    assert bnext.memory.cached_bytes() == BLOCK


@pytest.mark.parametrize(
    ("limit", "error"), [(-1, ValueError), (2**63, ValueError), (1.5, TypeError), ("1", TypeError)]
)
def test_a_limit_that_is_none(limit: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        bnext.memory.set_limit(limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [LARGE, (4, 16, 128, 256)], ids=["some left", "whole blocks"])
def test_gradients_written_at_once_lie_half_a_page_apart(shape: tuple[int, ...]) -> None:
    """Stores to the same place of two pages hold up loads from just below it; the last element has its place."""
    x, residual, dy = (torch.randn(shape) for _ in range(3))
    x.requires_grad_()
    residual.requires_grad_()
    layer = bnext.BatchNorm2d(16, activation="relu")
    ours = torch.autograd.grad(layer(x, residual), (x, residual), dy)
    z = torch.nn.functional.batch_norm(x, None, None, training=True) + residual
    theirs = torch.autograd.grad(z.relu(), (x, residual), dy)
    assert (ours[1].data_ptr() - ours[0].data_ptr()) % 4096 == 2048
    for our, their in zip(ours, theirs, strict=True):
        sure = z.abs() > 1e-5  # elsewhere rounding decides on the slope
        torch.testing.assert_close(our[sure], their[sure], atol=1e-4, rtol=1e-4)
        assert our.flatten()[-1].isfinite()
    del ours, our
    assert bnext.memory.cached_bytes() == 3 * BLOCK  # and y's


def test_gradients_come_from_blocks_too() -> None:
    x = torch.randn(LARGE, requires_grad=True)
    bnext.BatchNorm2d(16)(x).sum().backward()
    x.grad = None
    assert bnext.memory.cached_bytes() >= BLOCK


def test_outputs_can_be_resized_shared_and_pickled(tmp_path: object) -> None:
    y = output()
    y.resize_(2 * y.numel())
    assert bool((y[: y.numel() // 2] == 1).all())
    shared = output().share_memory_()
    assert bool((shared == 1).all())
    torch.save(output(), f"{tmp_path}/y.pt")
    assert bool((torch.load(f"{tmp_path}/y.pt") == 1).all())


def test_threads_never_share_a_block() -> None:
    """Each writes its own number and reads it back while the others come and go."""

    def work(number: int) -> bool:
        right = True
        for step in range(20):
            value = float((number + step) % 2)
            y = output(value=value)
            right &= bool((y == value).all())
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_a_child_of_fork_goes_on() -> None:
    output()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if bool((output() == 1).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_sizes_that_nobody_asks_for_any_more_make_room() -> None:
    """Beyond the limit; not at once, for they may belong to the same step."""
    bnext.memory.set_limit(3 * BLOCK)
    others = [output((4, 16, 160, 160 + 8 * k)) for k in range(3)]
    del others
    kept = bnext.memory.cached_bytes()
    assert kept > BLOCK
    large = (4, 16, 160, 220)
    output(large)
    assert bnext.memory.cached_bytes() == kept
    for _ in range(1100):
        output(large)
    address = output(large).data_ptr()
    assert output(large).data_ptr() == address
    assert BLOCK < bnext.memory.cached_bytes() <= 3 * BLOCK


def test_forgotten_sizes_stay_where_there_is_room() -> None:
    bnext.memory.set_limit(20 * BLOCK)
    output()
    other = (4, 16, 160, 220)
    output(other)
    kept = bnext.memory.cached_bytes()
    for _ in range(1100):
        output(other)
    output(
        (4, 16, 160, 3000)
    )  # larger than what stays hot, and than any limit a block of which it could make room for
    assert bnext.memory.cached_bytes() >= kept


def test_a_process_that_may_have_less_keeps_less() -> None:
    code = """
import resource, torch, bnext
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
x, mean, var = torch.zeros(1, 1, 1), torch.zeros(1), torch.ones(1)
outputs = [bnext.functional.batch_norm(torch.zeros(1, 1, 25 << 20), mean, var) for _ in range(25)]
del outputs
print(bnext.memory.cached_bytes() >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1900 <= int(done.stdout) <= 2048
