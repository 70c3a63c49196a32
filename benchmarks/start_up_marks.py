"""When each thing of a start was done, by whoever did it: lines of services and of engines, and names of events."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tunesmith.common.v1 import event_pb2

# What the services' logs say, and what a row calls it.
LOG_MARKS: Mapping[str, str] = {
    "job-dispatching": "control: dispatched",
    "run-accepted": "node: run accepted",
    "engine-started": "node: engine process started",
    "engine-ready": "node: engine ready",
}


class LogLines:
    """What the two services say, with their own times; filled by the threads that read them."""

    def __init__(self) -> None:
        self._lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self._lock = threading.Lock()

    def add(self, name: str, line: str) -> None:
        with self._lock:
            self.raw.append(f"{name} | {line}")
            try:
                value = json.loads(line)
            except ValueError:
                return
            if isinstance(value, dict):
                self._lines.append(value)

    def since(self, unix_seconds: float) -> list[tuple[float, dict[str, Any]]]:
        """Lines said since then, with their times."""
        with self._lock:
            lines = list(self._lines)
        found = []
        for line in lines:
            if "timestamp" in line:
                said = datetime.fromisoformat(str(line["timestamp"])).timestamp()
                if said >= unix_seconds:
                    found.append((said, line))
        return found


def engine_marks(logs: list[Path], began: float) -> list[tuple[str, float]]:
    """Lines that engines log with their times, and those times, from `began` on."""
    marks = []
    for path in logs:
        for line in path.read_text(errors="replace").splitlines():
            try:
                said = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            except ValueError:
                continue
            if said >= began and "tunesmith" not in line:
                marks.append((f"engine: {line[24:110]}", said))
    return marks


def name_of(payload: event_pb2.EventPayload) -> str:
    """What a row calls an event; empty for one that is no mark."""
    kind = payload.WhichOneof("kind") or ""
    if kind == "phase":
        return event_pb2.Phase.Name(payload.phase.phase)
    if kind == "loading":
        stage, status = payload.loading.stage, payload.loading.status
        if status == event_pb2.STAGE_STATUS_PROGRESS:
            return ""
        return f"{event_pb2.LoadingStage.Name(stage)[14:]} {event_pb2.StageStatus.Name(status)[13:].lower()}"
    if kind == "job_state":
        return event_pb2.JobState.Name(payload.job_state.state)
    if kind == "run_state":
        return event_pb2.RunState.Name(payload.run_state.state)
    return {"step": "STEP 1", "plan": "PLAN", "log": f"log: {payload.log.message[:60]}"}.get(kind, kind)
