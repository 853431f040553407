"""The execution model that stands for a GPU in tests: it keeps its word, and planted faults do not go unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

import on_host

FOLDER = Path(__file__).resolve().parent / "cuda_on_host"
_PARTS = ("model_test", "planted_faults", "together_scenarios", "copy_scenarios")
SOURCES = [*(FOLDER / f"{name}.cpp" for name in _PARTS), *on_host.MODEL]

GOOD = [
    "block_sum",
    "many_blocks",
    "fresh_memory",
    "local_arrays",
    "warp_exchange",
    "shared_bits",
    "last_arrival",
    "deadlock",
    "divergence",
    "livelock",
    "failing_thread",
    "group_barrier",
    "early_launch",
    "cooperative_limit",
    "group_deadlock",
    "async_copies",
    "clusters",
    "cluster_deadlock",
    "bulk_copies",
]
RACES = [
    "race_missing_barrier",
    "race_warp_barrier_between_warps",
    "race_exchange_orders_nothing",
    "race_one_generation_late",
    "race_skipped_barrier",
    "race_early_arrival",
    "race_between_blocks",
    "race_bits_read_too_early",
    "race_skipped_group_barrier",
    "race_group_one_generation_late",
    "race_skipped_cluster_wait",
    "race_left_cluster",
    "race_barrier_seen_too_early",
    "race_bulk_copy_too_early",
]
OVERRUNS = ["overrun_block_memory", "overrun_displaced_store"]
POISONED = ["poison_early_read", "poison_early_bulk_read"]
# Where reports point: to scenarios, but for what a barrier's word, a copy and the end of a block access.
PLACES = ("planted_faults.cpp", "together_scenarios.cpp", "copy_scenarios.cpp", "scenarios.h")
PLACES_OF = {
    "race_left_cluster": ("end_thread",),
    "race_barrier_seen_too_early": ("arrivals_at",),
    "race_bulk_copy_too_early": ("begin",),
}
PHRASES = {"race": "data race", "overrun": "heap-buffer-overflow", "poison": "use-after-poison"}


def model_test(variant: str) -> Path:
    return on_host.build("model_test", variant, SOURCES)


def test_every_scenario_is_run() -> None:
    listed = on_host.execute(model_test("plain"), "plain").stdout.split()
    assert listed == sorted(GOOD + RACES + OVERRUNS + POISONED)


@pytest.mark.parametrize("variant", on_host.VARIANTS)
@pytest.mark.parametrize("scenario", GOOD)
def test_correct_kernels_pass_in_silence(scenario: str, variant: str) -> None:
    done = on_host.execute(model_test(variant), variant, scenario)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("scenario", "variant"),
    [*((race, "thread") for race in RACES), *((overrun, "address") for overrun in OVERRUNS + POISONED)],
)
def test_planted_faults_are_reported(scenario: str, variant: str) -> None:
    done = on_host.execute(model_test(variant), variant, scenario)
    assert done.returncode != 0
    summary = [line for line in done.stderr.splitlines() if line.startswith("SUMMARY")]
    assert len(summary) == 1, done.stderr
    assert PHRASES[scenario.split("_")[0]] in summary[0]
    assert any(name in summary[0] for name in PLACES_OF.get(scenario, PLACES))
