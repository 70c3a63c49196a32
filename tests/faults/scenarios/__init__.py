"""The fault scenarios: a `Scenario` that a module here makes is run for being here, and needs no other list."""

from __future__ import annotations

import importlib
import pkgutil

from tests.faults.scenario import Scenario


def _scenarios() -> tuple[Scenario, ...]:
    found: dict[str, Scenario] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, Scenario):
                # A name stands for one scenario: shards and results go by it.
                assert found.setdefault(value.name, value) == value, f"two scenarios are named {value.name}"
    return tuple(found.values())


SCENARIOS: tuple[Scenario, ...] = _scenarios()
