"""What the node makes of a planner that ends without an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_service.domain.errors import Fault, Refusal
from gpu_service.runs import planner_process
from gpu_service.runs.planner_process import PlannerProcess


@pytest.mark.parametrize(
    ("script", "num_kills", "reason", "fault"),
    [
        ("kill -9 $$", 1, "HOST_OUT_OF_MEMORY", Fault.HARDWARE),
        ("kill -9 $$", 0, "PLANNING", Fault.PLATFORM),
        ("exit 5", 1, "PLANNING", Fault.PLATFORM),
    ],
)
async def test_a_planner_that_the_kernel_killed_for_memory_is_named(
    script: str, num_kills: int, reason: str, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([7, 7 + num_kills])
    monkeypatch.setattr(planner_process, "oom_kills", lambda: next(counts))
    monkeypatch.setattr(planner_process, "_COMMAND", ("/bin/sh", "-c", script))
    with pytest.raises(Refusal) as caught:
        await PlannerProcess(tmp_path).ask({}, answer="planned")
    assert (caught.value.reason, caught.value.fault, caught.value.stage) == (reason, fault, "PLANNING")
