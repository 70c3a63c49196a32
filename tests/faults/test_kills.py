"""A small trial of each kill scenario; kills at failpoints have a file of their own. `make faults` does the rest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.expecting import expect_held
from tests.faults.scenario import Trial
from tests.faults.scenarios.adoption import kill_servers
from tests.faults.scenarios.create import create_at_once
from tests.faults.scenarios.kill_random import kill_at_random
from tests.faults.scenarios.outage import go_out

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


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
