"""A cancel that meets a run while it saves: CANCELLED, nothing half-written, memory given back, the engine still fit.

The stop comes through the control pipe as a shim sends it, and through the switch between two artifacts; both at a
point that the test chooses, so that no clock decides.
"""

from __future__ import annotations

import gc
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from torch.optim import Optimizer

from gpu_service.engine import durable
from gpu_service.engine.control import ControlPipe
from gpu_service.engine.service import EXIT_CLEAN, serve
from gpu_service.engine.stopping import StopMode, StopSwitch
from tests.fakes.engine_runs import Workspace, read_log

_TIMEOUT_SECONDS = 60.0
# A run of the small settings enters SAVING twice: for its last checkpoint, and for its artifacts.
_CHECKPOINT, _ARTIFACTS = 1, 2


class _Pipe(ControlPipe):
    """The engine's real end of the pipe; when `stopped` enters SAVING for the n-th time, a cancel comes in."""

    def __init__(
        self, ours: socket.socket, theirs: socket.socket, *, runs: list[Path], stopped: Path, saving: int
    ) -> None:
        super().__init__(theirs)
        self._ours = ours
        self._left = iter(runs)
        self._stopped = stopped
        self._left_to_save = saving
        self._obeyed = threading.Event()
        self.notices: list[dict[str, Any]] = []

    def next_order(self) -> Path | None:
        return next(self._left, None)

    def notify(self, notice: dict[str, Any]) -> None:
        self.notices.append(notice)
        if notice.get("run_directory") != str(self._stopped) or notice.get("phase") != "SAVING":
            return
        self._left_to_save -= 1
        if self._left_to_save == 0:
            stop = {"type": "stop_run", "run_directory": str(self._stopped), "mode": "cancel", "grace_seconds": 30}
            self._ours.sendall(json.dumps(stop).encode() + b"\n")
            # The training thread is here; it goes on once the control thread has carried the stop to it.
            assert self._obeyed.wait(_TIMEOUT_SECONDS)

    def clear(self, run_directory: Path) -> bool:
        """The run leaves nothing."""
        return True

    def _stop(self, run_directory: Path, mode: StopMode) -> None:
        super()._stop(run_directory, mode)
        self._obeyed.set()


def _assert_cancelled_without_a_trace(directory: Path) -> None:
    log = read_log(directory)
    assert log.phases[-1] == "SAVING"
    assert log.states == ["RUNNING", "STOPPING", "CANCELLED"]
    assert [payload.WhichOneof("kind") for payload in log.payloads][-3:] == [
        "run_state",
        "memory_released",
        "run_state",
    ]
    assert not log.of("artifact")
    assert not log.of("realized")
    # Neither a staging directory nor a whole artifact that no manifest lists; the checkpoint is whole or not there.
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"step-00000002"}
    assert durable.read_manifest(directory / "checkpoints/step-00000002")["step"] == 2
    assert not [path for path in directory.rglob("*") if "artifacts" in path.relative_to(directory).as_posix()]
    (released,) = log.of("memory_released")
    assert not released.engine_ended
    # What was trained is gone from this process.
    gc.collect()
    alive = gc.get_objects()
    assert not [thing for thing in alive if isinstance(thing, (PeftModel, Optimizer))]


@pytest.mark.parametrize(
    ("training_type", "saving"),
    [pytest.param("qlora", _CHECKPOINT, id="checkpoint"), pytest.param("full", _ARTIFACTS, id="artifacts")],
)
def test_cancel_over_the_pipe(training_type: str, saving: int, workspace: Workspace) -> None:
    stopped = workspace.make_run(f"pipe-{training_type}", training_type=training_type)
    after = workspace.make_run(f"pipe-{training_type}-after", training_type=training_type)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pipe = _Pipe(ours, theirs, runs=[stopped, after], stopped=stopped, saving=saving)
        pipe.start()
        assert serve(pipe) == EXIT_CLEAN

    states = [notice["state"] for notice in pipe.notices if notice["type"] == "run_finished"]
    assert states == ["CANCELLED", "SUCCEEDED"]
    _assert_cancelled_without_a_trace(stopped)
    # The base came back clean: the next run begins where the cancelled one did.
    assert read_log(after).losses == read_log(stopped).losses


class _SwitchThatCancels(StopSwitch):
    """Cancels at the first boundary after a file of the artifacts is there, which is still being staged."""

    def __init__(self, directory: Path, file: str) -> None:
        super().__init__()
        self._written = directory / ".staging-artifacts" / file
        self.met = False

    def check(self) -> None:
        if self._written.is_file():
            self.met = True
            self.request(StopMode.CANCEL)
        super().check()


@pytest.mark.parametrize("file", ["adapter/README.md", "merged/model.safetensors"])
def test_cancel_between_two_files(file: str, workspace: Workspace, run_in_process: Any) -> None:
    """The adapter was written whole, or a shard of an export begun; a cancelled run leaves neither."""
    directory = workspace.make_run(Path(file).parent.name, hyperparameters={"exports": ["merged"]})
    switch = _SwitchThatCancels(directory, file)
    run_in_process(directory, switch=switch)

    assert switch.met
    _assert_cancelled_without_a_trace(directory)
