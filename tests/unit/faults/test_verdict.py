"""What a trial says of a job that ended otherwise than it should: with it, why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.faults.driver import verdict
from tests.faults.driver.world import World
from tunesmith.common.v1 import event_pb2

SUCCEEDED, FAILED = event_pb2.JOB_STATE_SUCCEEDED, event_pb2.JOB_STATE_FAILED


def test_a_job_that_failed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure: dict[str, Any] = {"reason": "PLANNING", "message": "it died", "signal": 9, "exit_status": None, "file": ""}
    rows = {
        "a": {"attempt": 3, "num_retries": 2, "max_retries": 5, "failure": {**failure, "versions": {"torch": "2"}}},
        "b": {"attempt": 1, "num_retries": 0, "max_retries": 5, "failure": None},
    }
    monkeypatch.setattr(verdict, "read_database", lambda directory: SimpleNamespace(jobs=rows))
    world = cast(World, SimpleNamespace(control_directory=tmp_path))
    finding = verdict.ended_as_asked(
        world, {"a": FAILED, "b": SUCCEEDED, "c": SUCCEEDED}, {"a": {SUCCEEDED}, "b": {FAILED}, "c": {SUCCEEDED}}
    )
    assert (finding.tried, finding.held) == (3, 1)
    assert finding.violations == (
        "job a ended JOB_STATE_FAILED in attempt 3 after 2 of 5 retries: PLANNING: it died (signal 9)",
        "job b ended JOB_STATE_SUCCEEDED",
    )
