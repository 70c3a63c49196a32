"""The fault scenarios: one module each with a `SCENARIO`, and the list of all of them."""

from __future__ import annotations

from tests.faults.scenario import Scenario
from tests.faults.scenarios import (
    bad_links,
    compaction_race,
    crowd_of_watchers,
    cut_consumers,
    deadlines,
    half_open,
    locked_store,
    rolling_restart,
    sender_kills,
    stalled_consumers,
    twins,
)

# One line a scenario; `python -m tests.faults` runs them in this order.
SCENARIOS: tuple[Scenario, ...] = (
    sender_kills.SCENARIO,
    cut_consumers.SCENARIO,
    bad_links.SCENARIO,
    half_open.SCENARIO,
    stalled_consumers.SCENARIO,
    crowd_of_watchers.SCENARIO,
    compaction_race.SCENARIO,
    locked_store.SCENARIO,
    rolling_restart.SCENARIO,
    deadlines.SCENARIO,
    twins.SCENARIO,
)
