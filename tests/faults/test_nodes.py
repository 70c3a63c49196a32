"""A trial each of what the scenarios with several real processes do in numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.scenario import Scenario, Trial
from tests.faults.scenarios import fencing, lost_node, old_backup

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(
    ("scenario", "seed"),
    [(fencing.SCENARIO, 0), (old_backup.SCENARIO, 0), (old_backup.SCENARIO, 1), (lost_node.SCENARIO, 9)],
    ids=["fencing", "restored", "wiped", "lost-while-collecting"],
)
def test_a_trial_holds(scenario: Scenario, seed: int, tmp_path: Path) -> None:
    for finding in scenario.run(Trial(directory=tmp_path, seed=seed)):
        assert finding.held == finding.tried, finding.violations
