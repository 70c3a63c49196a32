"""A disk without room while a real training goes on: what is left out, what is said, and what stands still."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_service.journal import STEPS_LOST, JournalFull, Writer
from tests.fakes.engine_runs import RunLog, Workspace
from tunesmith.common.v1 import errors_pb2, event_pb2

RunInProcess = Callable[..., RunLog]


def _refuse_once(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """The disk has no room the n-th time that it is asked for some, from 1; gives the sizes that were asked for."""
    from gpu_service.engine import room

    asked: list[int] = []
    require = room.require

    def once(directory: Path, num_bytes: int) -> None:
        asked.append(num_bytes)
        if len(asked) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        require(directory, num_bytes)

    monkeypatch.setattr(room, "require", once)
    return asked


def _saved(log: RunLog) -> list[int]:
    return [event.step for event in log.of("checkpoint") if event.status == event_pb2.CHECKPOINT_STATUS_COMMITTED]


def test_a_checkpoint_without_room_is_left_out_and_training_goes_on(
    workspace: Workspace, run_in_process: RunInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    hyperparameters = {"num_steps": 4, "save_every_steps": 1, "evaluate_every_steps": 1, "keep_checkpoints": 10}
    quiet = workspace.make_run("quiet", training_type="lora", hyperparameters=hyperparameters)
    expected = run_in_process(quiet)
    asked = _refuse_once(monkeypatch, 2)
    run = workspace.make_run("left-out", training_type="lora", hyperparameters=hyperparameters)

    log = run_in_process(run)

    assert log.states == ["RUNNING", "SUCCEEDED"], log.payloads[-1]
    assert _saved(expected) == [1, 2, 3, 4]
    assert _saved(log) == [1, 3, 4]
    (warning,) = log.of("warning")
    assert warning.code == "checkpoint-failed"
    assert "step 2" in warning.message
    assert not list((run / "checkpoints").glob(".staging-*"))
    # Nothing of it shows in what is trained; what is not there is not the best.
    assert log.losses == expected.losses
    best = [event.step for event in log.of("checkpoint") if event.best]
    losses = {event.step: event.held_out_loss for event in log.of("checkpoint") if event.files}
    assert losses[best[-1]] == min(losses.values())
    (plan,) = log.of("plan")
    # AdamW keeps two moments of every trained weight.
    assert asked[0] == pytest.approx(12 * plan.num_trainable_parameters, rel=0.01)


def test_artifacts_without_room_are_a_typed_failure_and_leave_nothing(
    workspace: Workspace, run_in_process: RunInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse_once(monkeypatch, 2)
    run = workspace.make_run("no-artifacts", training_type="lora")

    log = run_in_process(run)

    failure = log.of("run_state")[-1].failure
    assert (failure.reason, failure.fault) == (errors_pb2.ERROR_REASON_DISK_FULL, errors_pb2.FAULT_PLATFORM)
    assert failure.file == "artifacts/adapter"
    assert _saved(log) == [2]
    assert not list(run.glob("*artifacts*"))


# These have room of their own, where the file system can keep some.
_CLOSING = ("run_state", "memory_released")


class _FullFor:
    """A journal's `append` that finds no room so many times, from the first event of a kind on."""

    def __init__(self, kind: str, times: int, *, spared: tuple[str, ...] = _CLOSING) -> None:
        self._append = Writer.append
        self._kind = kind
        self._spared = spared
        self.left = times
        self.is_full = threading.Event()

    def __call__(self, writer: Writer, payload: event_pb2.EventPayload) -> int:
        kind = payload.WhichOneof("kind")
        begins = self.is_full.is_set() or kind == self._kind
        if self.left and begins and kind not in self._spared and payload.warning.code != STEPS_LOST:
            self.is_full.set()
            self.left -= 1
            raise JournalFull("no space is left for events")
        return self._append(writer, payload)


def test_an_event_without_room_waits_and_is_not_lost(
    workspace: Workspace, run_in_process: RunInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_service.engine import room

    monkeypatch.setattr(room, "_LOOK_AGAIN_SECONDS", 0.0)
    full = _FullFor("step", 3)
    monkeypatch.setattr(Writer, "append", lambda writer, payload: full(writer, payload))

    log = run_in_process(workspace.make_run("waits", training_type="lora"))

    assert log.states == ["RUNNING", "SUCCEEDED"], log.payloads[-1]
    assert sorted(log.losses) == [1, 2]
    assert [warning.code for warning in log.of("warning")] == ["disk-full"]
    assert full.left == 0


@pytest.mark.parametrize("mode", ["CANCEL", "CHECKPOINT"])
def test_a_stop_is_carried_out_on_a_full_disk(
    mode: str, workspace: Workspace, run_in_process: RunInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_service.engine import room
    from gpu_service.engine.stopping import StopMode, StopSwitch

    switch = StopSwitch()
    full = _FullFor("step", 1 << 30)

    def look_again(check: Callable[[], None]) -> None:
        switch.request(StopMode[mode])
        check()

    monkeypatch.setattr(room, "wait_for_room", look_again)
    monkeypatch.setattr("gpu_service.engine.service.wait_for_room", look_again)
    monkeypatch.setattr(Writer, "append", lambda writer, payload: full(writer, payload))
    options: dict[str, Any] = {"switch": switch}

    log = run_in_process(workspace.make_run(f"stopped-{mode}", training_type="lora"), **options)

    assert log.states[-1] == {"CANCEL": "CANCELLED", "CHECKPOINT": "INTERRUPTED"}[mode]
    # Whoever pauses a job is told what that cost; of what is cancelled nothing was to be kept.
    told = [warning.message for warning in log.of("warning")]
    if mode == "CANCEL":
        assert told == []
    else:
        assert told == ["stopped at step 1, of which no checkpoint could be written: all that was trained is lost"]


def test_a_checkpoint_stop_without_room_for_the_checkpoint_says_what_is_lost(
    workspace: Workspace, run_in_process: RunInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_service.engine import room
    from gpu_service.engine.stopping import StopMode, StopSwitch

    switch = StopSwitch()
    append, require = Writer.append, room.require

    def stop_at_the_third_step(writer: Writer, payload: event_pb2.EventPayload) -> int:
        if payload.step.step == 3:
            switch.request(StopMode.CHECKPOINT)
        return append(writer, payload)

    def have_none_once_stopped(directory: Path, num_bytes: int) -> None:
        if switch.mode is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        require(directory, num_bytes)

    monkeypatch.setattr(Writer, "append", stop_at_the_third_step)
    monkeypatch.setattr(room, "require", have_none_once_stopped)
    run = workspace.make_run(
        "paused-full", training_type="lora", hyperparameters={"num_steps": 4, "save_every_steps": 2}
    )
    options: dict[str, Any] = {"switch": switch}

    log = run_in_process(run, **options)

    assert log.states == ["RUNNING", "STOPPING", "INTERRUPTED"]
    assert [warning.code for warning in log.of("warning")] == ["checkpoint-failed", "steps-lost"]
    assert "what was trained after step 2 is lost" in log.of("warning")[-1].message


def test_a_stop_is_carried_out_where_even_its_beginning_finds_no_room(
    workspace: Workspace, run_in_process: RunInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_service.engine import room
    from gpu_service.engine.stopping import StopMode, StopSwitch

    switch = StopSwitch()
    # The step; STOPPING, as the loop and as the run's end say it.
    full = _FullFor("step", 3, spared=("memory_released", "memory_measured"))

    def look_again(check: Callable[[], None]) -> None:
        switch.request(StopMode.CANCEL)
        check()

    monkeypatch.setattr(room, "wait_for_room", look_again)
    monkeypatch.setattr("gpu_service.engine.service.wait_for_room", look_again)
    monkeypatch.setattr(Writer, "append", lambda writer, payload: full(writer, payload))
    options: dict[str, Any] = {"switch": switch}

    log = run_in_process(workspace.make_run("no-room-at-all", training_type="lora"), **options)

    assert full.left == 0
    assert log.states == ["RUNNING", "CANCELLED"]


def test_a_stop_before_the_first_word_of_training_gives_the_base_back_as_it_was(
    workspace: Workspace, run_in_process: RunInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_service.engine import service
    from gpu_service.engine.fast_path.model import FastModel
    from gpu_service.engine.resident import BaseShelf
    from gpu_service.engine.stopping import StopMode, StopSwitch

    def make_run(name: str, trainer: str) -> Path:
        return workspace.make_run(name, training_type="lora", hyperparameters={"num_steps": 2, "trainer": trainer})

    expected = run_in_process(make_run("fresh", "reference"), shelf=BaseShelf())
    shelf, switch = BaseShelf(), StopSwitch()
    full, release = _FullFor("log", 1), FastModel.release
    released: list[FastModel] = []

    def note_release(model: FastModel) -> None:
        released.append(model)
        release(model)

    def look_again(check: Callable[[], None]) -> None:
        switch.request(StopMode.CANCEL)
        check()

    with monkeypatch.context() as patched:
        patched.setattr(service, "wait_for_room", look_again)
        patched.setattr(Writer, "append", lambda writer, payload: full(writer, payload))
        patched.setattr(FastModel, "release", note_release)
        log = run_in_process(make_run("stopped-early", "fast"), shelf=shelf, switch=switch)
    assert log.states[-1] == "CANCELLED"
    assert log.phases[-1] == "LOADING"
    assert released
    assert shelf.describe()

    again = run_in_process(make_run("warm", "reference"), shelf=shelf)
    assert again.states[-1] == "SUCCEEDED", again.payloads[-1]
    assert again.losses == expected.losses
