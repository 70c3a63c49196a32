"""The fault scenarios: one module each with a `SCENARIO`, and the list of all of them."""

from __future__ import annotations

from tests.faults.scenario import Scenario
from tests.faults.scenarios.simulation import SCENARIO as SIMULATION

# One line a scenario; `python -m tests.faults` runs them in this order.
SCENARIOS: tuple[Scenario, ...] = (SIMULATION,)
