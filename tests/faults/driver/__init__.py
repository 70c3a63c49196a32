"""Drives both services as real processes through faults, and writes down everything that an offline checker needs.

`World` is the front: it starts the services, keeps them alive, does what a client does, breaks what it is told to,
heals, and hands the evidence to `tests.faults.checker`. Judges nothing itself.
"""

from tests.faults.driver.services import CONTROL
from tests.faults.driver.world import World, WorldConfig

__all__ = ["CONTROL", "World", "WorldConfig"]
