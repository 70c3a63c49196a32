"""The fault scenarios: one module each with a `SCENARIO`, and the list of all of them."""

from __future__ import annotations

from tests.faults.scenario import Scenario
from tests.faults.scenarios.fencing import SCENARIO as FENCING
from tests.faults.scenarios.lost_node import SCENARIO as LOST_NODE
from tests.faults.scenarios.old_backup import SCENARIO as OLD_BACKUP
from tests.faults.scenarios.simulation import SCENARIO as SIMULATION
from tests.faults.scenarios.stopped_control import SCENARIO as STOPPED_CONTROL

# One line a scenario; `python -m tests.faults` runs them in this order.
SCENARIOS: tuple[Scenario, ...] = (SIMULATION, FENCING, LOST_NODE, OLD_BACKUP, STOPPED_CONTROL)
