"""A loop that runs ahead: when each step is told, and that nothing is told out of order or of what was not made."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpu_service.engine.failures import RunFailure
from gpu_service.engine.stopping import StopMode, StopRequested
from gpu_service.engine.training import batches
from gpu_service.engine.training import loop as loop_module
from gpu_service.engine.training.batches import MicroBatch
from gpu_service.engine.training.objectives import Outcome
from gpu_service.engine.training.out_of_memory import PassSize
from gpu_service.engine.training.step_telling import IssuedStep, StepTeller
from gpu_service.engine.training.updates import StepNumbers, UpdatesOnDevice
from tests.fakes.training_loops import NUM_STEPS, make_training, words_of
from tunesmith.common.v1 import event_pb2


def test_first_step_is_told_before_the_second_begins() -> None:
    training = make_training(on_device=True)
    told: list[int] = []
    forward = training.objective.forward

    def watched(model: Any, batch: MicroBatch) -> Outcome:
        told.append(len(training.reporter.steps))
        return forward(model, batch)

    training.objective.forward = watched  # type: ignore[method-assign]
    training.loop.run()
    assert told[:2] == [0, 1]
    # One may be on its way.
    assert all(step - 1 <= count <= step for step, count in enumerate(told) if step > 1)


def test_a_step_is_told_at_its_end_while_the_next_one_is_still_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training(on_device=True)
    emit, told = training.reporter.emit, {step: threading.Event() for step in range(1, NUM_STEPS + 1)}
    forward, waited = training.objective.forward, []

    def noted(message: Any) -> None:
        emit(message)
        if isinstance(message, event_pb2.StepEvent):
            told[message.step].set()

    def holding(model: Any, batch: MicroBatch) -> Outcome:
        # In the midst of a step; the passes before it are those of the steps before it.
        if training.objective.num_passes:
            waited.append(told[training.objective.num_passes].wait(60))
        return forward(model, batch)

    monkeypatch.setattr(training.reporter, "emit", noted)
    training.objective.forward = holding  # type: ignore[method-assign]
    training.loop.run()
    assert waited == [True] * (NUM_STEPS - 1)
    assert words_of(training) == [f"step {number + 1}" for number in range(NUM_STEPS)]


def test_steps_are_waited_for_with_their_own_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other would get a context of this process."""
    training, device, made = make_training(on_device=True), torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda one: made.append((one, threading.current_thread().name)))
    teller = StepTeller(data=training.loop.data, reporter=training.loop.reporter, halts=True, background_on=device)
    numbers = StepNumbers(rows=[], norm=1.0, is_finite=True, updated=True, seconds=1.0)
    issued = IssuedStep(
        step=0, batches=[], weights=[], learning_rate=0.1, peak_memory_bytes=0,
        read=lambda: replace(numbers, norm=float(len(made))),
    )  # fmt: skip
    told = teller.hand_over(issued)()
    teller.close()
    assert told.numbers.norm == 1.0
    ((one, name),) = made
    assert one == device
    assert name != threading.current_thread().name


@pytest.mark.parametrize("step", [1, 3])
def test_nothing_is_told_behind_what_could_not_be(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training(on_device=True)
    emit = training.reporter.emit

    def failing(message: Any) -> None:
        if getattr(message, "step", 0) == step:
            raise OSError("for a test")
        emit(message)

    monkeypatch.setattr(training.reporter, "emit", failing)
    with pytest.raises(OSError, match="for a test"):
        training.loop.run()
    assert words_of(training) == [f"step {number + 1}" for number in range(step - 1)]


def test_a_stop_waits_for_what_is_in_hand() -> None:
    training = make_training(on_device=True)
    forward = training.objective.forward

    def stopping(model: Any, batch: MicroBatch) -> Outcome:
        if training.objective.num_passes == 3:
            training.switch.request(StopMode.CHECKPOINT)
        return forward(model, batch)

    training.objective.forward = stopping  # type: ignore[method-assign]
    with pytest.raises(StopRequested):
        training.loop.run()
    assert words_of(training) == ["step 1", "step 2", "step 3", "step 4", "STOPPING"]
    assert list(training.checkpoints.saved) == [4]
    assert torch.equal(training.checkpoints.saved[4], training.model.adapter.detach())


def test_smaller_passes_are_told_after_the_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training(on_device=True)
    whole = make_training(on_device=False)
    failed: list[int] = []
    collate = batches.collate

    def collating(data: Any, references: Any) -> MicroBatch:
        if training.objective.num_passes == 2 and not failed:
            failed.append(len(references))
            raise torch.OutOfMemoryError("for a test")
        return collate(data, references)

    whole.loop.run()
    monkeypatch.setattr(loop_module, "collate", collating)
    training.loop.run()
    assert failed == [2]
    said = [type(one).__name__ for one in training.reporter.said]
    assert said == ["StepEvent"] * 2 + ["MicroBatchReducedEvent"] + ["StepEvent"] * 4
    for ours, theirs in zip(training.reporter.steps, whole.reporter.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)


def test_a_stop_where_nothing_can_be_said_saves_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: each event waits for room, and a stop ends that."""
    training = make_training(on_device=True)
    emit = training.reporter.emit

    def emit_until_full(message: Any) -> None:
        if getattr(message, "step", 0) >= 3:
            training.switch.request(StopMode.CHECKPOINT)
            training.switch.check()
        emit(message)

    monkeypatch.setattr(training.reporter, "emit", emit_until_full)
    with pytest.raises(StopRequested):
        training.loop.run()
    assert words_of(training) == ["step 1", "step 2", "STOPPING"]
    # The stop comes when the third is told, while the fourth may be on its way.
    (saved,) = training.checkpoints.saved
    assert saved == training.loop.progress.steps_done
    assert saved in (3, 4)
    assert torch.equal(training.checkpoints.saved[saved], training.model.adapter.detach())


@pytest.mark.parametrize("spoiled", [{}, {2: math.nan}])
def test_a_step_that_finds_no_memory_is_told_after_the_steps_before(
    spoiled: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training(on_device=True, policy="stop", spoiled=spoiled)
    collate = batches.collate

    def collating(data: Any, references: Any) -> MicroBatch:
        if training.objective.num_passes == 2:
            raise torch.OutOfMemoryError("for a test")
        return collate(data, references)

    monkeypatch.setattr(loop_module, "collate", collating)
    monkeypatch.setattr(PassSize, "_halve", lambda *arguments: None)
    with pytest.raises(RunFailure if spoiled else torch.OutOfMemoryError):
        training.loop.run()
    assert words_of(training) == ["step 1", "step 2", *(["non-finite-loss"] if spoiled else [])]


def test_an_update_that_finds_no_memory_is_told_after_the_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training(on_device=True)
    apply, calls = UpdatesOnDevice.apply, []

    def applying(self: UpdatesOnDevice, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("for a test")
        return apply(self, *arguments)

    monkeypatch.setattr(UpdatesOnDevice, "apply", applying)
    with pytest.raises(torch.OutOfMemoryError):
        training.loop.run()
    assert words_of(training) == ["step 1", "step 2"]
