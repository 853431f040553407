"""The engines' own sources as programs without torch (engines_on_host/): calls in, results out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import on_host
from host_calls import HostCall, Reader, Result

ROOT = Path(__file__).resolve().parents[1]
CSRC, PROGRAMS = ROOT / "csrc", ROOT / "tests" / "engines_on_host"


@dataclass(frozen=True)
class Engine:
    """Sources of a program; what takes longest to compile comes first."""

    name: str
    sources: tuple[Path, ...]
    environment: tuple[tuple[str, str], ...] = ()


_KERNELS = ("backward", "forward", "resident_backward", "resident_forward")
CUDA = Engine(
    "cuda",
    (
        *(CSRC / "cuda" / f"{name}.cu" for name in _KERNELS),
        PROGRAMS / "cuda.cpp",
        *on_host.MODEL,
        *(CSRC / name for name in ("plan.cpp", "plan_cuda.cpp", "plan_resident.cpp")),
    ),
)


def cpu(instruction_set: str) -> Engine:
    """On the kernels of this one of bnext.build_info()["instruction_sets"]."""
    tiles = [CSRC / "cpu" / f"tiles_{name}.cpp" for name in ("baseline", "v3", "v4")]
    others = [CSRC / "cpu" / f"{name}.cpp" for name in ("backward", "forward", "machine")]
    return Engine(
        "cpu",
        (*tiles, PROGRAMS / "cpu.cpp", *others, CSRC / "plan.cpp"),
        (("BNEXT_INSTRUCTION_SET", instruction_set),),
    )


def execute(
    calls: Sequence[HostCall], variant: str, engine: Engine = CUDA
) -> tuple[CompletedProcess[str], bytes]:
    """Builds the engine in this variant if need be, and runs it over the calls."""
    program = on_host.build(engine.name, variant, engine.sources)
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder) / "calls", Path(folder) / "results"
        given.write_bytes(b"".join(call.encode() for call in calls))
        done = on_host.execute(program, variant, str(given), str(results), **dict(engine.environment))
        return done, results.read_bytes() if results.exists() else b""


def run(calls: Sequence[HostCall], variant: str = "plain", engine: Engine = CUDA) -> list[Result]:
    """The result of every call; fails with what the executable said if one went wrong."""
    done, data = execute(calls, variant, engine)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]
    reader = Reader(data)
    results = [reader.result(call) for call in calls]
    assert reader.at == len(data), "there are more results than calls"
    return results
