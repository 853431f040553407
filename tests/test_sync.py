"""Synchronized layers in two and in three processes, on the CPU: sync_scenarios.py says what each of them does."""

from __future__ import annotations

import datetime
import json
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

import sync_uses  # noqa: F401 it adds its own
from sync_scenarios import SCENARIOS

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch was built without gloo"
)
PATIENCE = datetime.timedelta(seconds=120)  # for a process that failed


def process(rank: int, world: int, folder: Path) -> None:
    """Runs the scenarios until one fails, for others may then wait in another place; leaves what it found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=PATIENCE
    )
    found = {}
    try:
        for name, scenario in SCENARIOS.items():
            found[name] = "it did not end"
            try:
                scenario(rank, world)
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
                break
            dist.barrier()
    finally:
        (folder / f"{rank}.json").write_text(json.dumps(found))
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=lambda world: f"{world} processes")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of every process: what went wrong by scenario."""
    folder = tmp_path_factory.mktemp("processes")
    # Forks of one process that has imported these, not each anew.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._inductor.compile_fx"])
    multiprocessing.start_processes(
        process, (request.param, folder), nprocs=request.param, start_method="forkserver"
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_in_processes(name: str, found: list[dict[str, str]]) -> None:
    for rank, of in enumerate(found):
        wrong = of.get(name, "an earlier one failed")
        assert not wrong, f"in process {rank}: {wrong}"
