"""A small trial of each kill scenario, and every failpoint of both services hit once. `make faults` does the rest."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from control_service.domain import failpoints as control_failpoints
from gpu_service.journal import failpoints as gpu_failpoints
from tests.faults.scenario import Finding, Trial
from tests.faults.scenarios.adoption import kill_servers
from tests.faults.scenarios.create import create_at_once
from tests.faults.scenarios.kill_at_failpoints import ROLES, Site, kill_everywhere
from tests.faults.scenarios.kill_random import kill_at_random
from tests.faults.scenarios.outage import go_out

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

# Promises that compare times with a limit; a machine that does other things at the time is no witness.
_TIMED = frozenset({"R5", "R6"})


def expect_held(findings: Iterable[Finding]) -> None:
    broken = [finding for finding in findings if finding.held != finding.tried]
    assert not [finding for finding in broken if finding.worst is None or finding.promise not in _TIMED], broken


def test_every_failpoint_is_hit_and_whoever_dies_there_loses_nothing(tmp_path: Path) -> None:
    halves = {
        "control": [Site(name=name) for name in control_failpoints.DECLARED],
        "gpu": [Site(name=name) for name in gpu_failpoints.DECLARED],
        "roles": ROLES[::2],
    }
    with ThreadPoolExecutor(len(halves)) as pool:
        running = {
            name: pool.submit(kill_everywhere, Trial(directory=tmp_path / name, seed=1), sites)
            for name, sites in halves.items()
        }
    for future in running.values():
        expect_held(future.result())


def test_a_small_trial_of_each_other_scenario(tmp_path: Path) -> None:
    def trial(name: str) -> Trial:
        return Trial(directory=tmp_path / name, seed=3)

    with ThreadPoolExecutor(4) as pool:
        running = [
            pool.submit(kill_at_random, trial("random"), num_faults=6, num_steps=60),
            pool.submit(create_at_once, trial("create"), num_clients=12, num_kills=3),
            pool.submit(go_out, trial("outage"), outage_seconds=2.0, num_steps=250),
            pool.submit(kill_servers, trial("adoption"), num_kills=1),
        ]
    for future in running:
        expect_held(future.result())
