"""A few hundred schedules of faults in virtual time, and that the simulation itself is one that can be trusted."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.scenarios.simulation import findings
from tests.faults.simulation.virtual_loop import NothingWillHappen, VirtualLoop
from tests.faults.simulation.world import Outcome, simulate

_SHARD = 40


@pytest.mark.parametrize("shard", range(3))
def test_whatever_happens_every_invariant_holds(shard: int) -> None:
    found = findings(first_seed=shard * _SHARD, count=_SHARD)
    assert not found[0].violations, "\n".join(found[0].violations)


@pytest.mark.parametrize("seed", [1, 3])
def test_the_store_in_memory_is_as_the_database(seed: int, tmp_path: Path) -> None:
    outcome = simulate(seed, database=tmp_path / "control.sqlite")
    assert not outcome.broken
    assert outcome.num_commits > 50


def test_a_seed_is_a_schedule() -> None:
    first, again = simulate(7, traced=True), simulate(7, traced=True)
    assert first.trace == again.trace
    assert simulate(8).digest != first.digest


def test_a_schedule_does_not_depend_on_the_order_of_sets() -> None:
    script = "from tests.faults.simulation.world import simulate; print([simulate(s).digest for s in range(20, 32)])"
    told = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(told) == 1, told


def test_schedules_are_about_something() -> None:
    outcomes: list[Outcome] = [simulate(seed) for seed in range(60)]
    assert sum(outcome.num_crashes for outcome in outcomes) > 20
    assert sum(outcome.num_restores for outcome in outcomes) > 1
    assert sum(outcome.num_attempts for outcome in outcomes) > 50


def test_virtual_time_passes_at_once_and_deadlocks_are_told() -> None:
    loop = VirtualLoop()
    try:
        loop.run_until_complete(asyncio.sleep(1_000_000.0))
        assert loop.time() >= 1_000_000.0
        with pytest.raises(NothingWillHappen):
            loop.run_until_complete(loop.create_future())
    finally:
        loop.close()
