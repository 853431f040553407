"""The stages of `make gpu`: each a process of its own with a time limit, so that one run tells everything.

They stand in the order of how likely they are to be broken, and how little the rest is worth if they are. Whatever a
stage prints goes on to the terminal and into a log of its own. The limits leave a minute and a half of ten for the
build; one that overran its limit takes from those after it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.needs import cuda_tool

ROOT = Path(__file__).resolve().parents[2]
# Tests with nothing beside them on the device, by stage, and seconds.
CUDA_TESTS = {
    "cuda_graphs": ("tests/test_cuda_graphs.py", 40),
    "cuda_calls": ("tests/test_cuda_calls.py", 55),
}
SECONDS_OF_SILENCE = 30  # of one test, then it says where it is
BENCH_RESERVE = 30  # seconds that a case may take which began just in time
SECONDS_TO_REPORT = 5  # of a stage that was interrupted
LONGEST_LIST = 12  # of failures, in the summary

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Stage:
    """`command` is what follows the interpreter; a stage with a reason to skip it is not run."""

    name: str
    seconds: float  # limit
    command: tuple[str, ...]
    skip: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    junit: Path | None = None
    prefix: tuple[str, ...] = ()  # what starts the interpreter

    @property
    def arguments(self) -> list[str]:
        return [*self.prefix, sys.executable, *self.command]


@dataclass
class Outcome:
    name: str
    outcome: str
    seconds: float
    details: list[str]

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, "outcome": self.outcome, "seconds": self.seconds, "details": self.details}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _pytest(junit: Path, *selection: str) -> tuple[str, ...]:
    """-x is off: all of it runs, unless so much fails that a broken device is the likely cause."""
    options = ["-q", "--tb=short", "--maxfail=60", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    return ("-m", "pytest", *selection, *options, "-o", f"faulthandler_timeout={SECONDS_OF_SILENCE}")


def _workers(count: int) -> tuple[str, ...]:
    """Where pytest has them: one that lost its device is replaced (tests/conftest.py)."""
    return ("-n", str(count)) if _has("xdist") else ()


def _tests(logs: Path) -> Stage:
    """The tests of every device, on this one, by several workers: most of a test is NumPy on the CPU."""
    ignored = [*(file for file, _ in CUDA_TESTS.values()), "tests/cuda_on_host"]
    if not _has("hypothesis"):
        ignored += [
            str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py") if _hypothesis(path)
        ]
    selection = [
        "tests",
        "-k",
        "cuda and not on_host and not sources",
        *(f"--ignore={path}" for path in ignored),
        *_workers(min(8, os.cpu_count() or 1)),
    ]
    junit = logs / "tests.xml"
    return Stage("tests", 120, _pytest(junit, *selection), environment={"OMP_NUM_THREADS": "2"}, junit=junit)


def _cuda_tests(logs: Path) -> list[Stage]:
    made = []
    for name, (file, seconds) in CUDA_TESTS.items():
        junit = logs / f"{name}.xml"
        made.append(Stage(name, seconds, _pytest(junit, file, *_workers(1)), junit=junit))
    return made


def _hypothesis(path: Path) -> bool:
    return "hypothesis" in path.read_text()


def _sanitizer(tool: str, calls: str, seconds: float, environment: dict[str, str]) -> Stage:
    """Errors of calls are bnext's to report, which checks each of its own; torch tries some that may fail."""
    program = cuda_tool("compute-sanitizer")
    options = ("--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no", "--print-limit", "20")
    return Stage(
        tool if calls == "small" else f"{tool}_{calls}",
        seconds,
        ("-m", "benchmarks.gpu.smoke", f"--{calls}"),
        skip="" if program else "compute-sanitizer is neither on PATH nor beside nvcc",
        environment=environment,
        prefix=(program or "compute-sanitizer", *options),
    )


def stages(logs: Path, results: Path) -> list[Stage]:
    bench = 95
    return [
        Stage("smoke", 45, ("-m", "benchmarks.gpu.smoke")),
        Stage("waiting", 30, ("-m", "benchmarks.gpu.smoke", "--waiting")),
        _tests(logs),
        *_cuda_tests(logs),
        # Every tensor in memory of its own: torch's blocks would hide what runs over an edge.
        _sanitizer("memcheck", "small", 40, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        _sanitizer("memcheck", "waiting", 45, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        _sanitizer("racecheck", "small", 40, {}),
        Stage(
            "bench",
            bench,
            ("-m", "benchmarks.gpu.bench", "--json", str(results), "--seconds", str(bench - BENCH_RESERVE)),
        ),
    ]


def failures_in(junit: Path) -> tuple[str, list[str]]:
    """Counts in words, and a line for each test that failed."""
    try:
        root = ElementTree.parse(junit).getroot()
    except (OSError, ElementTree.ParseError):
        return "no report was written", []
    suite = root if root.tag == "testsuite" else root[0]
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    lines = []
    for case in suite.iter("testcase"):
        for problem in [*case.findall("failure"), *case.findall("error")]:
            message = (problem.get("message") or "").strip().splitlines() or [""]
            lines.append(f"{case.get('classname')}::{case.get('name')}: {message[0][:160]}")
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return f"{passed} passed, {failed} failed, {count['skipped']} skipped", lines


def _details(stage: Stage, log: Sequence[str], outcome: str) -> list[str]:
    """What the summary says of a stage besides its outcome: counts of tests, and whatever failed."""
    said = [line for line in log if line.strip()]
    if stage.junit is not None:
        counts, lines = failures_in(stage.junit)
        found = [counts, *lines]
    elif outcome == PASSED:
        found = said[-1:]
    else:
        signs = ("FAILED", "=========", "Error", "error:")
        found = [line for line in said if any(sign in line for sign in signs)] or said[-LONGEST_LIST:]
    more = len(found) - LONGEST_LIST
    return found[:LONGEST_LIST] + ([f"and {more} more, see the log"] if more > 0 else [])


def _stop(process: subprocess.Popen[str]) -> None:
    """With everything it started. Interrupted first, for then pytest writes the report of what it has done."""
    for how in (signal.SIGINT, signal.SIGKILL):  # what it started may outlive it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_REPORT)


def run_all(chosen: Sequence[Stage], logs: Path, keep: Callable[[list[Outcome]], object]) -> list[Outcome]:
    """Runs them one after the other, in the time of their limits and of one that does not stop; keeps what is known
    after each."""
    stopping = 2 * SECONDS_TO_REPORT
    deadline = time.monotonic() + sum(stage.seconds for stage in chosen if not stage.skip) + stopping
    outcomes: list[Outcome] = []
    for stage in chosen:
        left = deadline - time.monotonic() - stopping
        outcomes.append(run(replace(stage, seconds=max(1.0, min(stage.seconds, left))), logs))
        keep(outcomes)
    return outcomes


def run(stage: Stage, logs: Path) -> Outcome:
    """Runs the stage to its end or its limit."""
    print(f"\n== {stage.name}, at most {stage.seconds:.0f} s: {' '.join(stage.arguments)}", flush=True)
    if stage.skip:
        print(f"skipped: {stage.skip}", flush=True)
        return Outcome(stage.name, SKIPPED, 0.0, [stage.skip])
    logs.mkdir(parents=True, exist_ok=True)
    if stage.junit is not None:
        stage.junit.unlink(missing_ok=True)
    start, log = time.monotonic(), []
    process = subprocess.Popen(
        stage.arguments,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()
    timer = threading.Timer(stage.seconds, lambda: (late.set(), _stop(process)))
    timer.start()
    try:
        assert process.stdout is not None
        with (logs / f"{stage.name}.log").open("w") as file:
            for line in process.stdout:
                log.append(line.rstrip("\n"))
                file.write(line)
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        timer.cancel()
    outcome = FAILED if code or late.is_set() else PASSED
    details = _details(stage, log, outcome)
    if stage.junit is not None and details[0].startswith("0 passed"):
        outcome = FAILED  # all skipped: a build without CUDA, for one
    if late.is_set():
        details.insert(0, f"stopped at its limit of {stage.seconds:.0f} s")
    elif code < 0:
        details.insert(0, f"ended by signal {-code}")
    return Outcome(stage.name, outcome, round(time.monotonic() - start, 1), details)


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.name:<12}{outcome.outcome:<9}{outcome.seconds:6.1f} s")
        lines += [f"    {detail}" for detail in outcome.details]
    return lines
