"""The fault scenarios: one module each with a `SCENARIO`, and the list of all of them."""

from __future__ import annotations

from tests.faults.scenario import Scenario
from tests.faults.scenarios import cancels, engine_failures, hangs, orphans, quarantine, real_engine

# One line a scenario; `python -m tests.faults` runs them in this order.
SCENARIOS: tuple[Scenario, ...] = (
    hangs.SCENARIO,
    cancels.SCENARIO,
    quarantine.SCENARIO,
    orphans.SCENARIO,
    engine_failures.SCENARIO,
    real_engine.SCENARIO,
)
