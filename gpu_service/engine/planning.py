"""Runs the planner as a child process and reads its answer; a stop kills the child at once.

Not one that was begun while the engine imports its libraries: a stop meets it behind them, when its run is taken up.

Counts nothing itself: a run without data needs no planner, only the checks.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from gpu_service.catalog.base_models import read_directory
from gpu_service.domain.errors import Refusal
from gpu_service.domain.plan import Device, resolve
from gpu_service.domain.plan_start import EXPORT
from gpu_service.domain.spec import TrainingSpec, spec_digest
from gpu_service.engine.failures import RunFailure, library_versions
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.request import RunRequest
from gpu_service.engine.spare_planner import SparePlanner
from gpu_service.engine.stopping import StopSwitch
from gpu_service.engine.training.manifest_facts import read_trainer
from gpu_service.journal.events import failure
from gpu_service.oom_counter import oom_kills
from tunesmith.common.v1 import event_pb2, plan_pb2

_LOG_INTERVAL_SECONDS = 2.0
_MAX_OUTPUT_CHARACTERS = 4000


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A planner at work on a run's request. Whoever has it calls `finish` or `end`."""

    child: subprocess.Popen[bytes]
    # What it was told of the device.
    device: Mapping[str, Any]
    errors_path: Path
    oom_kills_before: int

    def is_for(self, device: Mapping[str, Any]) -> bool:
        """Whether it plans for this device, as it was a moment ago: what is free changes all the time."""
        return _lasting(self.device) == _lasting(device)

    def end(self) -> None:
        """Nobody wants its plan."""
        with StopSwitch().owning(self.child):
            if self.child.stdout is not None:
                self.child.stdout.close()


def needs_planner(request: RunRequest) -> bool:
    """Whether the run has data; an export has none."""
    return request.spec.task != EXPORT


def begin(
    request: RunRequest, *, command: Sequence[str], device: Mapping[str, Any], spare: SparePlanner | None = None
) -> Begun:
    """Have the run planned, by `spare` if that is there. Waits for nothing. Raises OSError."""
    request_path = request.run_directory / "planner-request.json"
    request_path.write_text(
        json.dumps(
            {
                "spec": request.spec_json,
                "model_directory": str(request.model_directory),
                "blobs_directory": str(request.blobs_directory),
                "cache_directory": str(request.cache_directory),
                "device": dict(device),
                "weights_digest": request.weights_digest,
                "calibrations": request.calibrations,
                "begun_by": "" if request.resume is None else read_trainer(request.resume.directory),
            }
        ),
        encoding="utf-8",
    )
    errors_path = request.run_directory / "planner.log"
    oom_kills_before = oom_kills()
    child = spare.take(request_path, errors_path) if spare is not None else None
    if child is None:
        child = _start(command, request_path, errors_path)
    return Begun(child=child, device=device, errors_path=errors_path, oom_kills_before=oom_kills_before)


def finish(begun: Begun, *, switch: StopSwitch, reporter: Reporter) -> Path:
    """The plan directory of the run, made anew or from the planner's cache.

    Raises RunFailure when the planner refuses (its own reason and fault) or dies (HOST_OUT_OF_MEMORY where the kernel
    killed it for memory, else PLANNING), StopRequested, OSError.
    """
    child = begun.child
    with switch.owning(child):
        answer = _follow(child, switch, reporter)
        child.wait()
    switch.check()
    if answer.get("type") == "planned":
        return Path(answer["plan_directory"])
    if answer.get("type") == "refused":
        raise _refusal(answer["failure"])
    output = ""
    if begun.errors_path.exists():
        output = begun.errors_path.read_text(encoding="utf-8", errors="replace")[-_MAX_OUTPUT_CHARACTERS:]
    raise _death(child.returncode, output, out_of_memory=oom_kills() > begun.oom_kills_before)


def _lasting(device: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in device.items() if name != "free_memory_bytes"}


def _death(code: int, output: str, *, out_of_memory: bool) -> RunFailure:
    """The failure of a planner that ended without an answer, by what `Popen` says of its end."""
    out_of_memory = out_of_memory and code == -signal.SIGKILL
    what = (
        "was killed by the kernel because the machine's memory ran out"
        if out_of_memory
        else f"ended with status {code}"
    )
    return RunFailure(
        failure(
            reason="HOST_OUT_OF_MEMORY" if out_of_memory else "PLANNING",
            fault="HARDWARE" if out_of_memory else "PLATFORM",
            message=f"the planner {what}, without an answer: {output}",
            stage="PLANNING",
            versions=library_versions(),
            exit_status=code if code >= 0 else None,
            signal=-code if code < 0 else None,
        )
    )


def check(request: RunRequest, *, device: dict[str, Any]) -> plan_pb2.Plan:
    """The plan of a run without data, at level CHECK: everything resolved, nothing selected or counted.

    Raises RunFailure when the spec is refused (its own reason and fault).
    """
    try:
        base = read_directory(request.model_directory, request.spec.base_model)
        checked = resolve(
            TrainingSpec.from_json(request.spec_json),
            replace(base, weights_digest=request.weights_digest),
            Device.from_json(device),
            spec_digest=spec_digest(request.spec_json),
        )
    except Refusal as refusal:
        raise _refusal(refusal.to_failure()) from refusal
    return json_format.ParseDict(checked.to_json(), plan_pb2.Plan())


def _start(command: Sequence[str], request_path: Path, errors_path: Path) -> subprocess.Popen[bytes]:
    with errors_path.open("wb") as errors:
        return subprocess.Popen(
            [*command, str(request_path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            process_group=0,
        )


def _follow(child: subprocess.Popen[bytes], switch: StopSwitch, reporter: Reporter) -> dict[str, Any]:
    """Read the child's lines to their end; the answer, or an empty dict when it gave none."""
    answer: dict[str, Any] = {}
    last_log = time.monotonic()
    assert child.stdout is not None
    with child.stdout as lines:
        for line in lines:
            switch.note_progress()
            try:
                message = json.loads(line)
            except ValueError:
                # A line cut short by the child's death; its exit status tells the rest.
                continue
            if message["type"] != "progress":
                answer = message
            elif time.monotonic() - last_log >= _LOG_INTERVAL_SECONDS:
                last_log = time.monotonic()
                text = f"planning: {message['done']} of {message['total']} {message['unit']}"
                reporter.emit(event_pb2.LogEvent(level="info", message=text))
    return answer


def _refusal(refused: dict[str, Any]) -> RunFailure:
    return RunFailure(
        failure(
            reason=refused["reason"],
            fault=refused["fault"],
            message=refused["message"],
            stage=refused.get("stage") or "PLANNING",
            exception_type=refused.get("exception_type", ""),
            file=refused.get("file", ""),
            versions=library_versions(),
            details={name: str(value) for name, value in refused.get("details", {}).items()},
        )
    )
