"""Quarantine: imposed with a reason, told once, and lifted when the reason is gone."""

from __future__ import annotations

import sys

from gpu_service.runs.quarantine import Quarantine
from gpu_service.shim import device_memory
from gpu_service.shim.configuration import EngineConfiguration


async def test_a_device_is_held_until_it_is_free() -> None:
    quarantine = Quarantine()
    changes: list[str] = []
    quarantine.changed = lambda: changes.append(quarantine.reason("cuda:0"))
    free = False
    quarantine.impose("cuda:0", "full", lambda: free)
    quarantine.impose("cuda:0", "full", lambda: free)
    await quarantine.look()
    assert (quarantine.reason("cuda:0"), quarantine.reason("cuda:1")) == ("full", "")
    free = True
    await quarantine.look()
    assert quarantine.reason("cuda:0") == ""
    quarantine.lift("cuda:0")
    assert changes == ["full", ""]


def _asking(program: str, before_bytes: int) -> EngineConfiguration:
    return EngineConfiguration(
        argv=(),
        environment={},
        device={"type": "cuda", "index": 0},
        orphan_limit_seconds=1,
        grace_seconds=0,
        hang_limit_seconds=1,
        device_memory_command=(sys.executable, "-c", program),
        device_memory_bytes=before_bytes,
    )


def test_what_is_held_above_the_base_line_counts_and_what_nobody_tells_does_not() -> None:
    gibibytes = 1 << 30
    assert device_memory.held_bytes(_asking(f"print({3 * gibibytes})", gibibytes)) == 2 * gibibytes
    assert device_memory.held_bytes(_asking(f"print({gibibytes})", gibibytes - device_memory.SLACK_BYTES)) == 0
    assert device_memory.held_bytes(_asking("raise SystemExit(1)", 0)) == 0
    assert device_memory.held_bytes(_asking("print('many')", 0)) == 0
