"""What is made of the measurements on a GPU, on any machine: classes, floors, bars, the table, the kept file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import stages
from benchmarks.gpu.classes import CLASSES, COMPILED, Bar, Class, all_cases, is_compiled
from benchmarks.gpu.judge import (
    HELD,
    MISSED,
    NOT_MEASURED,
    Figures,
    figures,
    floor_seconds,
    share_of_floor,
    verdicts,
)
from benchmarks.gpu.results import Result, Run, read, write
from benchmarks.gpu.table import COLUMNS, markdown, missed
from benchmarks.gpu.timing import GRAPH_BYTES, L2_BETWEEN, rotation
from benchmarks.shapes import Case

MB = 1e6
COPY = 4e12  # bytes per second
GROUP = {group.name: group for group in CLASSES}
NHWC = GROUP["ResNet-50 b128 NHWC bfloat16"]
RESIDUAL = GROUP["ResNet-50 b128 BN+add+ReLU NHWC bfloat16"]
TINY = GROUP["tiny"]


def measured(case: Case, share: float, native: float, compiled: float = 1.3) -> Result:
    """A made-up result at that share of the floor."""
    seconds = floor_seconds(case, COPY) / share
    times = {"bnext": seconds, "native": seconds * native}
    if is_compiled(case):
        times["compile"] = seconds * compiled
    return Result(case, {name: [time] * 3 for name, time in times.items()}, {"cudnn": "native"})


def made_up(share: float = 0.8, native: float = 3.2) -> Run:
    gpu = {"name": "NVIDIA Imaginary", "driver": "1.2", "cuda": "13.0"}
    machine = {"torch": "2.11.0", "commit": "abc", "date": "today", "gpu": gpu}
    rates = {"copy": COPY, "read": 4.4e12, "node": 1.3e-6}
    return Run(machine, rates, [measured(case, share, native) for case in all_cases()])


def body(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


def verdict(run: Run, group: str, operation: str) -> str:
    return next(
        row[-1] for row in body(markdown(run)) if row[0].startswith(f"**{group}") and row[1] == operation
    )


def test_classes_hold_what_their_names_say() -> None:
    assert all(case.tensor_bytes <= 2.1 * MB for case in TINY.cases("forward"))
    assert all(12.5 * MB < case.tensor_bytes < 57 * MB for case in GROUP["mid NHWC 16-bit"].cases("forward"))
    assert all(case.tensor_bytes >= 50 * MB for case in GROUP["eval"].cases("eval"))
    cases = list(all_cases())
    assert len(set(cases)) == len(cases)
    assert all(case.operation == "eval" or len(case.shape) in (2, 4) for case in cases)


def test_a_network_is_all_of_its_layers() -> None:
    """The figures of a ResNet-50: 53 layers, 11.1 million elements per image."""
    for name in ("ResNet-50 b128 NHWC bfloat16", "ResNet-50 b128 NCHW float32"):
        cases = GROUP[name].cases("forward")
        assert sum(case.multiplicity for case in cases) == 53
        elements = sum(case.multiplicity * case.tensor_bytes / case.torch_dtype.itemsize for case in cases)
        assert elements / 128 == pytest.approx(11.1e6, rel=0.01)


def test_every_class_has_compiled_cases() -> None:
    for name, shapes in COMPILED.items():
        found = {case.shape for case in all_cases() if case.shapes == name and is_compiled(case)}
        assert found == set(shapes)


def test_residual_class_is_the_end_of_every_block() -> None:
    """A ResNet-50 has 3, 4, 6 and 3 blocks; each ends in a batch norm that a sum and a ReLU follow."""
    cases = RESIDUAL.cases("forward")
    assert [case.multiplicity for case in cases] == [3, 4, 6, 3]
    assert {case.shape for case in cases} <= {case.shape for case in NHWC.cases("forward")}
    assert {case.variant for group in CLASSES for case in group.cases("forward")} == {"bn", "bn_add_relu"}


# The last column: bytes of a mask of 2048 bits, whole words and one more.
@pytest.mark.parametrize(
    ("variant", "operation", "tensors", "mask"),
    [
        ("bn", "forward", 2, 0),
        ("bn", "backward", 3, 0),
        ("bn", "eval", 2, 0),
        ("bn_add_relu", "forward", 3, 264),
        ("bn_add_relu", "backward", 4, 264),
    ],
)
def test_floor_is_every_tensor_once(variant: str, operation: str, tensors: int, mask: int) -> None:
    case = Case("any", operation, (8, 16, 4, 4), "bfloat16", "channels_last", variant=variant)
    assert floor_seconds(case, COPY) == pytest.approx((tensors * 8 * 16 * 4 * 4 * 2 + mask) / COPY)
    assert share_of_floor(measured(case, 0.5, 2), COPY) == pytest.approx(0.5)
    assert share_of_floor(Result(case), COPY) is None


@pytest.mark.parametrize("case", list(all_cases()), ids=str)
def test_no_call_finds_its_input_in_l2(case: Case) -> None:
    l2 = 60 * 2**20
    found = rotation(case.bytes_minimum, l2)
    assert found.calls % found.sets == 0
    assert found.sets >= 2
    cold = (found.sets - 1) * case.bytes_minimum >= L2_BETWEEN * l2
    assert cold or found.sets == found.calls  # else each set is used once in a replay
    assert found.calls * case.bytes_minimum <= 2 * GRAPH_BYTES


def test_the_sum_weighs_by_calls() -> None:
    group = replace(
        NHWC, members=(((8, 4), "float32", "contiguous", 1), ((8, 8), "float32", "contiguous", 3))
    )
    small, large = group.cases("forward")
    run = Run(rates={"copy": COPY}, results=[measured(small, 1.0, 1.0), measured(large, 0.5, 3.0)])
    found = figures(group, "forward", run)
    floors = [1 * floor_seconds(small, COPY), 3 * floor_seconds(large, COPY)]
    own = [floors[0], floors[1] / 0.5]
    assert found.share == pytest.approx(sum(floors) / sum(own))
    assert found.native == pytest.approx((own[0] + 3 * own[1]) / sum(own))
    assert found.microseconds == pytest.approx(sum(own) * 1e6)


def test_the_worst_case_counts() -> None:
    group = Class("some", (((8, 4), "float32", "contiguous", 1), ((8, 8), "float32", "contiguous", 1)), {})
    first, second = group.cases("forward")
    run = Run(rates={"copy": COPY}, results=[measured(first, 0.9, 2.0), measured(second, 0.6, 3.0)])
    found = figures(group, "forward", run)
    assert found.share == pytest.approx(0.6)
    assert found.native == pytest.approx(2.0)
    assert found.microseconds == pytest.approx(floor_seconds(second, COPY) / 0.6 * 1e6)


def test_a_missing_case_leaves_its_class_unmeasured() -> None:
    for group in CLASSES:
        operation = next(iter(group.bars))
        run = made_up()
        run.results.remove(run.find(group.cases(operation)[-1]))
        assert figures(group, operation, run) == Figures()
        run = made_up()
        del run.find(group.cases(operation)[0]).seconds["native"]
        found = figures(group, operation, run)
        assert found.native is None and found.share is not None
        run = made_up()
        case = next(case for case in group.cases(operation) if is_compiled(case))
        del run.find(case).seconds["compile"]
        assert figures(group, operation, run).compiled is None
        run.rates = {}
        assert figures(group, operation, run).share is None


def test_held_missed_or_not_measured() -> None:
    bar = Bar(2.0, share=0.6)
    assert verdicts(bar, Figures(0.6, 1.0, 2.0)) == (HELD, HELD)
    assert verdicts(bar, Figures(0.5996, 1.0, 1.996)) == (HELD, HELD)  # print as 60.0% and 2.00
    assert verdicts(bar, Figures(0.59, 1.0, 1.9)) == (MISSED, MISSED)
    assert verdicts(bar, Figures(None, None, None)) == (NOT_MEASURED, NOT_MEASURED)
    in_time = Bar(1.5, microseconds=5)
    assert verdicts(in_time, Figures(0.01, 5.0, None)) == (HELD, NOT_MEASURED)
    assert verdicts(in_time, Figures(0.01, 5.2, 1.6)) == (MISSED, HELD)
    three = Bar(2.0, share=0.6, compiled=1.2)
    assert verdicts(three, Figures(0.6, 1.0, 1.9, 1.196)) == (HELD, MISSED, HELD)
    assert verdicts(three, Figures(0.6, 1.0, 2.0)) == (HELD, HELD, NOT_MEASURED)


def test_torch_compile_is_judged_by_the_compiled_cases() -> None:
    run = made_up()
    for operation in ("forward", "backward"):
        assert figures(RESIDUAL, operation, run).compiled == pytest.approx(1.3)
    assert verdict(run, RESIDUAL.name, "forward") == HELD
    cases = [case for case in RESIDUAL.cases("forward") if is_compiled(case)]
    run.put(measured(cases[0], 0.8, 3.2, compiled=0.5))
    weights = [case.multiplicity * floor_seconds(case, COPY) for case in cases]
    ratio = (0.5 * weights[0] + 1.3 * weights[1]) / sum(weights)
    assert verdict(run, RESIDUAL.name, "forward") == f"{HELD}; {HELD}; {MISSED}"
    (line,) = (line for line in missed(run) if line.startswith(RESIDUAL.name))
    assert f"and 3.20x, {ratio:.2f}x compile" in line


def test_table_of_no_run() -> None:
    rows = body(markdown(Run()))
    assert len(rows) == sum(len(group.bars) for group in CLASSES)
    assert {row[-1] for row in rows} == {NOT_MEASURED}
    assert all(len(row) == len(COLUMNS) for row in rows)
    kept = stages.ROOT / "benchmarks" / "results" / "gpu.md"
    assert kept.read_text() == markdown(Run()), "make it anew: python -m benchmarks.gpu --table"


def test_table_of_a_run() -> None:
    run = made_up(share=0.8, native=3.2)
    text = markdown(run)
    rows = body(text)
    assert "NVIDIA Imaginary, driver 1.2" in text and "4000 GB/s" in text
    assert len(rows) == sum(len(group.bars) * (1 + len(group.members)) for group in CLASSES)
    assert verdict(run, NHWC.name, "forward") == HELD
    assert verdict(run, "tiny", "backward") == HELD
    assert verdict(run, "eval", "eval") == f"{MISSED}; {HELD}"  # 80 % of 93 %
    assert [line.split(":")[0] for line in missed(run)] == ["eval, worst eval"]
    row = next(row for row in rows if row[0] == "128x64x112x112" and row[1] == "forward")
    assert row[5:10] == ["128.45", "3200", "80.0%", "3.20", "native"]


def test_table_says_what_is_missing() -> None:
    run = made_up()
    case = NHWC.cases("forward")[0]
    run.put(Result(case, {}, {"bnext": "RuntimeError: out of registers"}))
    rows = body(markdown(run))
    row = next(
        row for row in rows if row[0] == case.label and row[2].startswith("bfloat16") and row[1] == "forward"
    )
    assert row[5] == NOT_MEASURED and row[-1] == "RuntimeError: out of registers"
    assert verdict(run, NHWC.name, "forward") == NOT_MEASURED


def test_a_run_is_kept_whole(tmp_path: Path) -> None:
    run = made_up()
    run.host = Result(Case("host", "step", (32, 512), "float32", "contiguous"), {"bnext": [1e-5]}, {})
    run.stages = [stages.Outcome("smoke", stages.PASSED, 3.0, ["all passed"]).plain()]
    for kept in (run, Run()):
        write(tmp_path / "run.json", kept)
        assert read(tmp_path / "run.json") == kept
    write(tmp_path / "run.json", run)
    assert driver.main(["--table", str(tmp_path / "run.json")]) == 0
    assert (tmp_path / "run.md").read_text() == markdown(run)


@pytest.mark.parametrize("commit", ["abc", "other"])
def test_stages_join_what_is_kept_of_the_same_commit(tmp_path: Path, commit: str) -> None:
    run, kept = made_up(), tmp_path / "run.json"
    run.machine["commit"] = "abc+"
    run.stages = [stages.Outcome(name, stages.FAILED, 3.0, []).plain() for name in ("smoke", "bench")]
    write(kept, run)
    again = stages.Outcome("smoke", stages.PASSED, 2.0, ["all passed"])
    driver.keep([again], kept, {**run.machine, "commit": commit})
    found = read(kept)
    if commit == "abc":
        assert found.results == run.results and found.stages == [run.stages[1], again.plain()]
    else:
        assert found.results == [] and found.stages == [again.plain()] and found.machine["commit"] == commit
    assert kept.with_suffix(".md").read_text() == markdown(found)
