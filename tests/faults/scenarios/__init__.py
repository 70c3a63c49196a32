"""The fault scenarios: one module each with a `SCENARIO`, and the list of all of them."""

from __future__ import annotations

from tests.faults.scenario import Scenario
from tests.faults.scenarios import adoption, create, kill_at_failpoints, kill_random, kill_real_engine, outage

# One line a scenario; `python -m tests.faults` runs them in this order.
SCENARIOS: tuple[Scenario, ...] = (
    kill_at_failpoints.SCENARIO,
    kill_random.SCENARIO,
    kill_real_engine.SCENARIO,
    create.SCENARIO,
    outage.SCENARIO,
    adoption.SCENARIO,
)
