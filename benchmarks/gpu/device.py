"""The GPU itself: what it is, and how fast it copies, reads and starts kernels."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

BUFFER_BYTES = 2**31
ROUNDS = 7
REPEATS = 5  # calls between two events
NODES = 500
WARM_UP_SECONDS = 0.5  # an idle device runs at a fraction of its clock


def driver() -> str:
    """The driver's version, as nvidia-smi has it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = done.stdout.split()
    return lines[0] if lines else "unknown"


def describe() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call: the median of rounds between two events, after one that warms up."""
    rounds = []
    for _ in range(ROUNDS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        rounds.append(float(start.elapsed_time(end)) * 1e-3 / repeats)
    return statistics.median(rounds[1:])


def rates(device: str) -> dict[str, float]:
    """copy: bytes read and written per second by y.copy_(x); read: by x.sum(); node: seconds per kernel of a graph.

    The kernels of the graph add to one element: each waits for the one before it, as layers do.
    """
    x, y = (torch.zeros(BUFFER_BYTES // 4, device=device) for _ in range(2))
    end = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < end:
        y.copy_(x)
        torch.cuda.synchronize()
    copy = 2 * BUFFER_BYTES / _seconds(lambda: y.copy_(x), REPEATS)
    read = BUFFER_BYTES / _seconds(x.sum, REPEATS)
    one = torch.zeros(1, device=device)
    one.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(NODES):
            one.add_(1)
    return {"copy": copy, "read": read, "node": _seconds(graph.replay, 1) / NODES}
