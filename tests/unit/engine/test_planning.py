"""The planner's child process, played by a shell: answers, refusals, deaths and stops."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from gpu_service.engine import planning
from gpu_service.engine.failures import RunFailure
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.request import DeviceChoice, RunRequest
from gpu_service.engine.stopping import StopMode, StopRequested, StopSwitch
from gpu_service.journal import Writer
from tunesmith.common.v1 import errors_pb2, training_spec_pb2

_REFUSED = {
    "reason": "MIX_INFEASIBLE",
    "fault": "USER",
    "message": "too few",
    "stage": "PLANNING",
    "exception_type": "",
    "file": "",
    "details": {"dataset_id": 3},
}


def _plan(tmp_path: Path, script: str, switch: StopSwitch | None = None) -> Path:
    request = RunRequest(
        run_directory=tmp_path,
        job_id="job",
        attempt=1,
        spec_digest="0",
        spec=training_spec_pb2.TrainingSpec(),
        spec_json={"base_model": "a/b"},
        weights_digest="12ab",
        model_directory=Path("/m"),
        blobs_directory=Path("/b"),
        cache_directory=Path("/c"),
        device=DeviceChoice(type="cpu"),
        resume=None,
        calibrations={},
    )
    notices: list[dict[str, Any]] = []
    with Writer.open(tmp_path / "journal", 1) as writer:
        begun = planning.begin(request, command=("/bin/sh", "-c", script, "planner"), device={"type": "cpu"})
        reporter = Reporter(run_directory=tmp_path, writer=writer, notify=notices.append)
        return planning.finish(begun, switch=switch or StopSwitch(), reporter=reporter)


def _say(message: object) -> str:
    return f"echo '{json.dumps(message)}'"


def test_planned(tmp_path: Path) -> None:
    # The request is the last argument, and it is the whole of it.
    script = f"cp $1 {tmp_path}/seen; " + _say({"type": "planned", "plan_directory": "/plans/1"})
    assert _plan(tmp_path, script) == Path("/plans/1")
    assert json.loads((tmp_path / "seen").read_text()) == {
        "spec": {"base_model": "a/b"},
        "model_directory": "/m",
        "blobs_directory": "/b",
        "cache_directory": "/c",
        "device": {"type": "cpu"},
        "weights_digest": "12ab",
        "calibrations": {},
        "begun_by": "",
    }


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFailure) as caught:
        _plan(tmp_path, _say({"type": "refused", "failure": _REFUSED}) + "; exit 3")
    failure = caught.value.failure
    assert failure.reason == errors_pb2.ERROR_REASON_MIX_INFEASIBLE
    assert failure.fault == errors_pb2.FAULT_USER
    assert dict(failure.details) == {"dataset_id": "3"}


@pytest.mark.parametrize(("script", "status"), [("echo why >&2; exit 5", 5), ("echo '{\"type'; exit 0", 0)])
def test_no_answer(script: str, status: int, tmp_path: Path) -> None:
    with pytest.raises(RunFailure) as caught:
        _plan(tmp_path, script)
    failure = caught.value.failure
    assert failure.reason == errors_pb2.ERROR_REASON_PLANNING
    assert failure.fault == errors_pb2.FAULT_PLATFORM
    assert failure.exit_status == status
    assert status != 5 or "why" in failure.message


def test_killed(tmp_path: Path) -> None:
    with pytest.raises(RunFailure) as caught:
        _plan(tmp_path, "kill -9 $$")
    assert caught.value.failure.signal == 9
    assert not caught.value.failure.HasField("exit_status")


@pytest.mark.parametrize(
    ("script", "num_kills", "reason"),
    [
        ("kill -9 $$", 1, "HOST_OUT_OF_MEMORY"),
        # Killed by somebody, and the kernel killed nobody meanwhile.
        ("kill -9 $$", 0, "PLANNING"),
        # Somebody else was killed for memory.
        ("kill -11 $$", 1, "PLANNING"),
        ("exit 5", 1, "PLANNING"),
    ],
)
def test_a_planner_that_the_kernel_killed_for_memory_is_named(
    script: str, num_kills: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([7, 7 + num_kills])
    monkeypatch.setattr(planning, "oom_kills", lambda: next(counts))
    with pytest.raises(RunFailure) as caught:
        _plan(tmp_path, script)
    failure = caught.value.failure
    assert errors_pb2.ErrorReason.Name(failure.reason) == f"ERROR_REASON_{reason}"
    assert failure.stage == "PLANNING"
    wanted = errors_pb2.FAULT_HARDWARE if reason == "HOST_OUT_OF_MEMORY" else errors_pb2.FAULT_PLATFORM
    assert failure.fault == wanted


def test_stop_ends_the_child_and_what_it_started(tmp_path: Path) -> None:
    switch = StopSwitch()
    fifo = tmp_path / "started"
    os.mkfifo(fifo)

    def stop() -> None:
        fifo.read_text()
        switch.request(StopMode.CANCEL)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(StopRequested):
        # The grandchild holds the pipe open: only the death of the whole group ends the reading.
        _plan(tmp_path, f"sleep 600 & echo up > {fifo}; wait", switch)
    stopper.join()
