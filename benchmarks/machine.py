"""Where and with what a measurement was made, and the two ways memory can behave in it."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
)
_ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "OMP_NUM_THREADS",
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
)
# glibc's mallopt parameters, malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory(pool_bytes: int) -> None:
    """Make glibc keep freed blocks, and hand it `pool_bytes` that have been touched already.

    By default blocks of 32 MB and more are mapped anew for each tensor, and every page of them faults on
    first use. Afterwards a new tensor lands in memory that was in use before, as an existing output would.
    The pool must be several times the tensors alive at once: posix_memalign cannot put a block into the
    hole its equal left.
    """
    libc = ctypes.CDLL(None)
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        if libc.mallopt(parameter, value) != 1:
            raise OSError("mallopt refused; --memory existing needs glibc's malloc")
    torch.empty(pool_bytes, dtype=torch.uint8).fill_(1)


def settle_memory() -> None:
    """Bring glibc's malloc to where it is after a training's first steps, whatever is measured first.

    It maps large blocks anew for each tensor, and reuses smaller ones; the bound between them grows from 128 KB to
    the largest mapped block freed so far, up to 32 MB.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)


def page_faults() -> int:
    """Minor page faults of this process so far, all threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpuinfo(key: str) -> str:
    lines = _text("/proc/cpuinfo").splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), ""
    )


def caches() -> dict[str, str]:
    """Size of each cache that core 0 sees, for instance {"L1 Data": "32K", ...}."""
    return {
        f"L{_text(index / 'level')} {_text(index / 'type')}": _text(index / "size")
        for index in sorted(_CACHES.glob("index*"))
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """The commit measured; '+' when tracked files differ from it."""
    return _git("rev-parse", "--short=12", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")


def _bnext() -> dict[str, str]:
    try:
        import bnext
    except ImportError as error:
        return {"missing": str(error)}
    return {key: str(value) for key, value in bnext.build_info().items()}


def describe() -> dict[str, object]:
    """Everything that a reader of the numbers has to know about the machine and the software."""
    flags = set(_cpuinfo("flags").split())
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": _cpuinfo("model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "caches": caches(),
        "huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "bnext": _bnext(),
    }
