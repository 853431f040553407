"""Builds and runs executables out of the kernels' sources, the CUDA ones over the execution model of cuda_on_host/.

A variant is how one is compiled: plain, or for a sanitizer, `address` (with undefined behavior) or `thread`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "on_host"

_TESTS = ROOT / "tests"
_FOLDERS = [
    ROOT / "csrc",
    _TESTS / "cuda_on_host",
    _TESTS / "engines_on_host",
    _TESTS / "engines_on_host" / "threads",
]
INCLUDES = [word for folder in _FOLDERS for word in ("-I", str(folder))]

# The model's own sources: to be built into every executable with CUDA kernels.
_PARTS = ("model", "model_group", "model_copies", "scheduler", "fiber")
MODEL = [_TESTS / "cuda_on_host" / f"{name}.cpp" for name in _PARTS]

# What takes least of compiling and running together: -O2 runs a sixth faster, and compiles for twice as long.
VARIANTS = {
    "plain": ["-Og"],
    "address": ["-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}

# For the processes: the first report ends one.
ENVIRONMENT = {
    "ASAN_OPTIONS": "halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0",
}


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def _compile(variant: str) -> list[str]:
    # The last two: vectors are passed between inlined functions only, and GCC 12 takes its own AVX-512 intrinsics for
    # uninitialised.
    flags = ["-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra"]
    flags += ["-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    return [*compiler(), *flags, *VARIANTS[variant]]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _newest(dependencies: Path) -> float:
    """When the youngest of the files was changed that this list of a compiler's names; infinity if one is gone."""
    if not dependencies.exists():
        return float("inf")
    _, _, names = dependencies.read_text().replace("\\\n", " ").partition(": ")
    times = [
        path.stat().st_mtime if path.exists() else float("inf") for path in map(Path, shlex.split(names))
    ]
    return max(times, default=float("inf"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-8000:]}")
    if done.stderr:
        warnings.warn(done.stderr, stacklevel=2)


def _object(folder: Path, source: Path, command: list[str]) -> Path:
    """The source compiled, for all executables, again only if it, a header or the command has changed."""
    target = folder / f"{source.name}.o"
    said, dependencies = folder / f"{source.name}.command", folder / f"{source.name}.d"
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    command = [*command, "-MMD", "-MF", str(dependencies), "-c", *language, str(source), "-o", str(target)]
    line = shlex.join(command)
    with _locked(folder / f"{source.name}.lock"):
        current = target.exists() and said.exists() and said.read_text() == line
        if not current or _newest(dependencies) > target.stat().st_mtime:
            said.unlink(missing_ok=True)
            _run(command)
            said.write_text(line)
    return target


def _built(folder: Path, name: str, variant: str, sources: Sequence[Path]) -> Path:
    command = [*_compile(variant), *INCLUDES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _object(folder.parent, source, command), sources))
    program, said = folder / name, folder / "link.command"
    command = [*_compile(variant), *map(str, objects), "-o", str(program)]
    line = shlex.join(command)
    current = program.exists() and said.exists() and said.read_text() == line
    if not current or max(path.stat().st_mtime for path in objects) > program.stat().st_mtime:
        said.unlink(missing_ok=True)
        _run(command)
        said.write_text(line)
    return program


def build(name: str, variant: str, sources: Sequence[Path]) -> Path:
    """The executable of these sources, .cu as C++. Skips the test if the compiler cannot make the variant.

    Processes that want the same one wait for the first to have built it.
    """
    reason = unavailable(variant)
    if reason is not None:
        pytest.skip(reason)
    folder = BUILT / variant / name
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        return _built(folder, name, variant, sources)


@functools.cache
def unavailable(variant: str) -> str | None:
    """Why programs of this variant cannot be built or do not run here; None if they do."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "empty.cpp", Path(folder) / "empty"
        source.write_text("int main() {}\n")
        for command in (
            [*_compile(variant), str(source), "-o", str(program)],
            [*launcher(variant), str(program)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                return f"no C++ compiler: {error}"
            if done.returncode != 0:
                said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
                return f"{shlex.join(compiler())} has no working variant '{variant}': {said}"
    return None


@functools.cache
def launcher(variant: str) -> tuple[str, ...]:
    """What to put before a command: ThreadSanitizer does not know every address that newer kernels hand out."""
    fixed = ("setarch", "-R")
    if variant != "thread" or shutil.which(fixed[0]) is None:
        return ()
    works = subprocess.run([*fixed, "true"], capture_output=True).returncode == 0
    return fixed if works else ()


def execute(
    program: Path, variant: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher(variant), str(program), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT | environment,
        timeout=600,
    )
