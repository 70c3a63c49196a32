"""The fault scenarios: one module each with a `SCENARIO`, and the list of all of them."""

from __future__ import annotations

from tests.faults.scenario import Scenario
from tests.faults.scenarios import power_loss, power_loss_engine

# One line a scenario; `python -m tests.faults` runs them in this order.
SCENARIOS: tuple[Scenario, ...] = (
    power_loss.SCENARIO,
    power_loss_engine.SCENARIO,
)
