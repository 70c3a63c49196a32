"""What is tried on full disks: each place at which the pair writes is out of room once, and nothing is restarted.

Every trial runs in a mount namespace (`full_disk`). Refuses to look at the services but through their interface, their
files, and their processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.faults import full_disk_of_control, full_disk_of_node
from tests.faults.full_disk import Ledger

TRIALS: Mapping[str, Callable[[Path, Ledger], None]] = {**full_disk_of_control.TRIALS, **full_disk_of_node.TRIALS}
