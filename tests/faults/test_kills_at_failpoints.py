"""Every failpoint of both services is hit once, in few worlds: who dies there loses nothing. `make faults` has a world
for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from control_service.domain import failpoints as control_failpoints
from gpu_service.journal import failpoints as gpu_failpoints
from tests.faults.driver.failpoints import DECLARED
from tests.faults.expecting import expect_held
from tests.faults.scenario import Trial
from tests.faults.scenarios.kill_at_failpoints import ROLES, Site, kill_everywhere

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

# Of what writes journals without being an engine, the one half; the other differs in who dies before.
PARTS: Mapping[str, Sequence[Site]] = {
    "control": [Site(name=name) for name in control_failpoints.DECLARED],
    "gpu": [Site(name=name) for name in gpu_failpoints.DECLARED],
    "roles": ROLES[::2],
}


def test_the_parts_are_all_that_there_is() -> None:
    assert {site.name for sites in PARTS.values() for site in sites} == set(DECLARED)


@pytest.mark.parametrize("part", PARTS)
def test_every_failpoint_is_hit_and_whoever_dies_there_loses_nothing(part: str, tmp_path: Path) -> None:
    expect_held(kill_everywhere(Trial(directory=tmp_path, seed=1), PARTS[part]))
