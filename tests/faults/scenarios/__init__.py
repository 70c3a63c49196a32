"""The fault scenarios: every module here has a `SCENARIO`, and being here is all that it takes to be run."""

from __future__ import annotations

import importlib
import pkgutil

from tests.faults.scenario import Scenario

SCENARIOS: tuple[Scenario, ...] = tuple(
    importlib.import_module(f"{__name__}.{found.name}").SCENARIO
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name)
)
