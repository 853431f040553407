"""benchmarks.networks: what it times computes the same, and what it keeps is what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bnext

pytest.importorskip("rich", reason="rich is in the bench extra: make lint installs it")

from benchmarks import networks
from benchmarks.resnet import KINDS, resnet
from fusing import counts

SMALL = ["--network", "resnet18", "--batch", "2", "--image", "32", "--rounds", "2", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("name", "norms", "parameters"), [("resnet18", 20, 11_689_512), ("resnet50", 53, 25_557_032)]
)
def test_networks_are_those_of_the_paper(name: str, norms: int, parameters: int) -> None:
    """Numbers of parameters as torchvision states them for its weights."""
    network = resnet(name)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == norms
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("name", KINDS)
def test_every_addition_and_activation_is_drawn_in(name: str) -> None:
    network = resnet(name)
    fused = bnext.fuse(network, torch.randn(2, 3, 64, 64))
    found, blocks = counts(fused), sum(KINDS[name].blocks)
    shortcuts = sum(isinstance(module, nn.Sequential) for module in network.modules()) - 1
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert found == {"norm": shortcuts, "norm+add+relu": blocks, "norm+relu": norms - blocks - shortcuts}


def test_a_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert networks.main([*SMALL, "--json", str(tmp_path / "run.json")]) == 0
    printed = capsys.readouterr().out
    kept = json.loads((tmp_path / "run.json").read_text())
    assert kept["machine"]["commit"] and kept["settings"]["network"] == "resnet18"
    assert [(one["layout"], one["name"]) for one in kept["results"]] == [
        (layout, name) for layout in networks.LAYOUTS for name in ("torch", "convert", "fuse")
    ]
    for one in kept["results"]:
        assert len(one["seconds"]) == 2 and min(one["seconds"]) > 0
        assert f"{min(one['seconds']):.3f}" in printed


def test_what_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgets(network: nn.Module, x: torch.Tensor) -> nn.Module:
        network[1] = nn.Identity()
        return network

    monkeypatch.setitem(networks.IMPLEMENTATIONS, "fuse", forgets)
    assert networks.main(SMALL) == 1
    assert "not timed: float32, contiguous, fuse: loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--batch", "0"], ["--image", "8"], ["--network", "vgg"], ["--threads", "-1"]]
)
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        networks.main(arguments)
    assert exit_code.value.code == 2
