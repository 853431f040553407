"""How `make gpu` runs its stages, on any machine: limits, failures, what is missing, and the smoke stage on the CPU."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import on_cuda
from benchmarks.gpu import needs, smoke, stages


def stage(code: str, seconds: float = 60, **options: object) -> stages.Stage:
    return stages.Stage("some", seconds, ("-c", code), **options)


def test_stages_pass_fail_and_stop(tmp_path: Path) -> None:
    good = stages.run(stage("print('all passed')"), tmp_path)
    assert (good.outcome, good.details) == (stages.PASSED, ["all passed"])
    assert (tmp_path / "some.log").read_text() == "all passed\n"
    bad = stages.run(stage("print('one FAILED'); print('fine'); raise SystemExit(1)"), tmp_path)
    assert (bad.outcome, bad.details) == (stages.FAILED, ["one FAILED"])
    crash = stages.run(stage("import os; os.kill(os.getpid(), 11)"), tmp_path)
    assert crash.outcome == stages.FAILED and crash.details[0] == "ended by signal 11"
    # A child that holds the pipe open is stopped too.
    child = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    late = stages.run(stage(child, seconds=1), tmp_path)
    assert late.outcome == stages.FAILED and late.details[0] == "stopped at its limit of 1 s"
    skipped = stages.run(stage("", skip="no tool"), tmp_path)
    assert (skipped.outcome, skipped.details) == (stages.SKIPPED, ["no tool"])
    assert any("stopped at its limit" in line for line in stages.summary([good, bad, crash, late, skipped]))


def test_one_that_overran_takes_from_those_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is kept after each of them."""
    monkeypatch.setattr(stages, "SECONDS_TO_REPORT", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    chosen = [replace(stage(deaf, seconds=1), name=name) for name in ("first", "second", "third")]
    kept: list[list[str]] = []
    start = time.monotonic()
    outcomes = stages.run_all(
        chosen, tmp_path, lambda known: kept.append([outcome.name for outcome in known])
    )
    assert time.monotonic() - start < 3 + 2 * 3 * 0.5 + 2
    assert all(outcome.details[0].startswith("stopped at its limit of") for outcome in outcomes)
    assert kept == [["first"], ["first", "second"], ["first", "second", "third"]]


def test_failures_of_tests_are_listed(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    junit = tmp_path / "three.xml"
    command = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={junit}",
        str(tmp_path / "test_three.py"),
    )
    outcome = stages.run(stages.Stage("three", 60, command, junit=junit), tmp_path)
    assert outcome.outcome == stages.FAILED
    assert outcome.details[0] == "1 passed, 1 failed, 1 skipped"
    assert outcome.details[1].endswith("test_three::test_b: assert 1 == 2")


def test_skipping_all_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "test_none.py").write_text("import pytest\n@pytest.mark.skip\ndef test_c(): pass\n")
    junit = tmp_path / "none.xml"
    command = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={junit}",
        str(tmp_path / "test_none.py"),
    )
    outcome = stages.run(stages.Stage("none", 60, command, junit=junit), tmp_path)
    assert (outcome.outcome, outcome.details) == (stages.FAILED, ["0 passed, 0 failed, 1 skipped"])


def test_the_files_that_stages_name_exist() -> None:
    assert all((stages.ROOT / file).is_file() for file, _ in stages.CUDA_TESTS.values())


def test_limits_of_all_stages_leave_time_for_the_build(tmp_path: Path) -> None:
    assert sum(stage.seconds for stage in stages.stages(tmp_path, tmp_path / "run.json")) <= 510


@pytest.mark.parametrize("lost", [True, False])
def test_a_worker_leaves_a_lost_device(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a launch is every later call's too; a test that fails for another reason is none."""

    def synchronize() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    left: list[int] = []
    monkeypatch.setattr(on_cuda, "AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    on_cuda.leave_without_device("a failure")
    assert left == []
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    on_cuda.leave_without_device("a failure")
    assert left == [on_cuda.LOST_DEVICE] * lost


def test_smoke_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["--small", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("running_var") == len(list(smoke.calls(small=True)))


def test_what_the_machine_lacks_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "_torch_is_missing", lambda: "it has no torch")
    assert needs.missing() == (
        "make gpu needs an NVIDIA GPU, nvcc, and a CUDA build of torch 2.11 or newer in PYTHON, but it has no torch."
    )
    monkeypatch.setattr(needs, "_torch_is_missing", lambda: None)
    monkeypatch.setattr(needs, "cuda_tool", lambda name: None)
    assert "nvcc is neither under CUDA_HOME nor on PATH" in (needs.missing() or "")
    monkeypatch.setattr(needs, "cuda_tool", lambda name: name)
    assert needs.missing() is None
    assert needs.file_name("NVIDIA H100 80GB HBM3") == "gpu_nvidia_h100_80gb_hbm3"
