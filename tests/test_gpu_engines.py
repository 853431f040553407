"""The comparison of the CUDA engines: who won where, and "not measured" where nobody timed both."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import engines, results
from benchmarks.gpu.classes import CLASSES

TINY = CLASSES[0]


def test_nothing_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engines.main(["--table", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 40
    assert all(line.endswith("| not measured |") for line in lines[2:])
    assert not any("eval" in line for line in lines)


def test_the_faster_engine_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = TINY.cases("forward")[:2]
    times = {"streaming": (4e-6, 3e-6), "resident": (2e-6, 6e-6)}
    for engine, seconds in times.items():
        run = results.Run()
        for case, value in zip((first, second), seconds, strict=True):
            run.put(results.Result(case, {"bnext": [value]}))
        results.write(tmp_path / f"{engine}.json", run)
    engines.main(["--table", "--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("| resident in 1 of 2, 1.00 x on average |")
    assert lines[3].endswith("| 4.00 | 2.00 | resident, 2.00 x |")
    assert lines[4].endswith("| 3.00 | 6.00 | streaming, 2.00 x |")
    assert lines[5].endswith("| not measured |")
