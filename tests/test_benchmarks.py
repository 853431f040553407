"""What surrounds the measurements on the CPU: variants and their bytes, peers that agree, tables, kept runs."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import measure, peers
from benchmarks.measure import Measurement
from benchmarks.shapes import OPERATIONS, VARIANTS, Case, Variant

CASES = [
    Case("given", operation, (4, 16, 8, 8), dtype, layout, variant=variant)
    for variant in VARIANTS
    for operation in OPERATIONS
    for dtype in ("float32", "bfloat16")
    for layout in ("contiguous", "channels_last")
]


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (Variant(), "2T 3T 5T 2T 4T"),
        (Variant("relu"), "2T 3T 5T 2T 4T+2b"),
        (Variant(residual=True), "3T 3T 6T 3T 5T"),
        (Variant("relu", residual=True), "3T+b 4T+b 7T+2b 3T 6T+2b"),
        (Variant("silu", residual=True), "3T 5T 8T 3T 8T"),
        (Variant("silu"), "2T 3T 5T 2T 5T"),
    ],
    ids=str,
)
def test_least_that_moves(variant: Variant, words: str) -> None:
    assert " ".join(str(variant.minimum(operation)) for operation in OPERATIONS) == words


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_are_those_of_the_plan(case: Case) -> None:
    """A tensor that stays in cache moves once, and that is the least."""
    assert peers.scheduled_bytes(case) == case.bytes_minimum


def test_scheduled_bytes_know_what_is_read_twice() -> None:
    case = Case("given", "step", (1 << 16, 1024, 8, 8), "float32", "channels_last", variant="bn_add_relu")
    scheduled = peers.scheduled_bytes(case)
    assert scheduled is not None
    assert scheduled - case.bytes_minimum == 3 * case.tensor_bytes + case.mask_bytes


def prepare(case: Case, *names: str) -> tuple[list[peers.Subject], dict[str, Tensor]]:
    """The implementations, and the results that they must have."""
    data = measure.settled(case, peers.data(case))
    found = []
    for name in names:
        try:
            found.append(peers.build(name, case, data))
        except peers.Unsupported:
            assert name.startswith("onednn")
    return found, measure.reference(case, data)


# A sum over few rows shows one slope that was taken the other way.
FEW_ROWS = [replace(case, shape=(32, 512)) for case in CASES if case.layout == "contiguous"]


@pytest.mark.parametrize("case", CASES + FEW_ROWS, ids=str)
def test_implementations_agree(case: Case) -> None:
    subjects, expected = prepare(case, "bnext", "eager", "onednn", "onednn_blocked", "clone")
    gradients = {"dx"} | ({"dresidual"} if case.residual else set())
    gradients |= {"dweight", "dbias"} if case.training else set()
    assert gradients <= set(expected) or not case.learns
    for subject in subjects:
        assert measure.disagreements(case, subject, expected) == []


@pytest.mark.parametrize("what", ["x", "residual"])
def test_a_wrong_gradient_is_found(what: str) -> None:
    case = Case("given", "step", (4, 16, 8, 8), "float32", "contiguous", variant="bn_add_relu")
    (subject,), expected = prepare(case, "eager")

    def half(tensor: Tensor) -> Tensor:
        """The same values, half the gradient."""
        return tensor.detach() * 0.5 + tensor * 0.5

    def call(x: Tensor, residual: Tensor) -> Tensor:
        assert subject.module is not None
        y: Tensor = subject.module(
            half(x) if what == "x" else x, half(residual) if what == "residual" else residual
        )
        return y

    (wrong,) = measure.disagreements(case, replace(subject, call=call), expected)
    assert f"eager d{what} is off by" in wrong


def test_the_residual_changes_nothing_else() -> None:
    plain, with_residual = (
        peers.data(Case("given", "step", (4, 16, 8, 8), "float32", "contiguous", variant=name))
        for name in ("bn", "bn_add_relu")
    )
    assert plain.inputs == (plain.x,) and len(with_residual.inputs) == 2
    assert torch.equal(plain.x, with_residual.x) and torch.equal(plain.dy, with_residual.dy)


def test_the_peer_is_written_as_residual_networks_are() -> None:
    """In place from the sum on: of the two tensors that backward reads, x and y, neither is a copy."""
    case = Case("given", "step", (4, 16, 8, 8), "float32", "contiguous", variant="bn_add_relu")
    (subject,), _ = prepare(case, "eager")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = subject.call(*subject.inputs)
    large = {tensor.data_ptr() for tensor in saved if tensor.shape == case.shape}
    assert large == {subject.inputs[0].data_ptr(), y.data_ptr()}


def test_table_and_kept_run(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="rich is in the bench extra: make lint installs it")
    from rich.console import Console

    from benchmarks import report

    case = Case("given", "backward", (32, 64, 56, 56), "float32", "contiguous", variant="bn_add_relu")
    times = {"bnext": 0.05, "eager": 0.1, "copy_": 0.01}
    by_name = {name: Measurement(name, [seconds] * 3, [0.0] * 3) for name, seconds in times.items()}
    rows = [
        report.Row(case, by_name, 150_000_000),
        report.Row(replace(case, shape=(32, 64, 28, 28)), by_name),
    ]
    # 32*64*56*56 elements of 4 bytes are 25.69 MB, four of them and a mask of 0.80 MB 103.56 MB.
    assert rows[0].rate("bnext") == pytest.approx(4.03125 * 25.690 / 0.05 / 1e3, rel=1e-3)
    assert rows[0].ratio("bnext", "copy_") == pytest.approx(0.01 * 103.56 / (2 * 25.69) / 0.05, rel=1e-3)
    console = Console(file=io.StringIO(), record=True, width=report.MINIMUM_WIDTH)
    report.show(rows, console)
    text = console.export_text()
    assert "bn_add_relu given backward float32 contiguous: at least 4T+b" in text
    (line,) = (line for line in text.splitlines() if "32x64x56x56" in line and "150" in line)
    assert [cell.strip() for cell in line.split("│")[3:6]] == ["25.69", "103.6", "150"]

    report.write(tmp_path / "run.json", rows, {"commit": "abc"}, {})
    assert report.read(tmp_path / "run.json") == (rows, {"commit": "abc"})
    old = (
        (tmp_path / "run.json").read_text().replace('"scheduled": 150000000, ', "")
    )  # a run from before it was kept
    (tmp_path / "run.json").write_text(old)
    assert report.read(tmp_path / "run.json")[0] == [replace(row, scheduled=None) for row in rows]


def test_no_more_than_memory_allows() -> None:
    pytest.importorskip("rich", reason="rich is in the bench extra: make lint installs it")
    from benchmarks import limits
    from benchmarks.report import Row

    def row(operation: str, scheduled: int | None = None, shape: int = 56, **seconds: float) -> Row:
        case = Case("given", operation, (32, 64, shape, shape), "float32", "contiguous")
        return Row(
            case, {name: Measurement(name, [time], [0.0]) for name, time in seconds.items()}, scheduled
        )

    tensor = 4 * 32 * 64 * 56 * 56
    rows = [
        row("eval", bnext=0.004, eager=0.005, clone=0.002),  # two tensors in 2 ms, by the copy
        row("step", scheduled=8 * tensor, bnext=0.010, eager=0.040),  # five at least, eight as planned
        row("step", shape=28, bnext=0.010, eager=0.040),  # no inference of it to compare with
    ]
    ((found, limit),) = limits.limits(rows)
    assert found is rows[1]
    assert limit.measured == pytest.approx(4)
    assert limit.as_scheduled == pytest.approx(0.040 / 0.008)
    assert limit.at_least == pytest.approx(0.040 / 0.005)
    assert [found for found, _ in limits.limits(rows[1:])] == []


@pytest.mark.parametrize("name", ["resnet51", "timm:no_such_network", "other:resnet50"])
def test_networks_that_nobody_knows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="rich is in the bench extra: make lint installs it")
    from benchmarks import networks

    with pytest.raises(SystemExit):
        networks.main(["--network", name])
    error = capsys.readouterr().err
    assert "error: argument --network: expected" in error and name in error
