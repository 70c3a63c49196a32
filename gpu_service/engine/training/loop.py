"""The training loop: planned steps in order, through accelerate. Emits a STEP event for each optimizer step.

Knows when to evaluate and when to save, not what an artifact is. A stop is honored between steps; a loss or gradient
that is not finite never reaches the weights. On a device that decides so by itself, a step is handed out before the
one before it is over; whatever looks at weights or progress waits for that first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from gpu_service.domain.planned_data import ExampleReference, PlannedData
from gpu_service.engine.devices import Device
from gpu_service.engine.failures import RunFailure, library_versions
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.stopping import StopMode, StopRequested, StopSwitch
from gpu_service.engine.training.batches import MicroBatch, MicroBatchLimit, collate, split
from gpu_service.engine.training.checkpoint_keeper import CheckpointKeeper
from gpu_service.engine.training.clipping import clip_gradient
from gpu_service.engine.training.flat_attention import attending_within_sequences
from gpu_service.engine.training.objectives import Objective
from gpu_service.engine.training.out_of_memory import ADDS_UP_ROUGHLY, PassSize
from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.engine.training.schedule import Schedule
from gpu_service.engine.training.step_report import as_history
from gpu_service.engine.training.step_telling import IssuedStep, StepTeller, ToldStep
from gpu_service.engine.training.updates import make_updates
from gpu_service.journal.events import failure
from tunesmith.common.v1 import errors_pb2, event_pb2, training_spec_pb2

# What becomes of a step whose loss or gradient is not finite, by the project's policy: whether training goes on.
_GOES_ON = {"stop": False, "skip": True}
CHECKPOINT_FAILED = "checkpoint-failed"


@dataclass(frozen=True, kw_only=True)
class _Gradient:
    """What a step's passes left: losses and norm on the device, `weights` one tuple a batch, `whole` their sum."""

    batches: list[MicroBatch]
    weights: list[tuple[int, ...]]
    whole: int
    values: list[torch.Tensor]
    norm: torch.Tensor


@runtime_checkable
class GivesNotice(Protocol):
    """A model that decides while it trains how its passes are made."""

    def take_notices(self) -> list[str]:
        """What it decided since the last time, for people."""
        ...


@runtime_checkable
class PreparesAddingUp(Protocol):
    """A model that has to be told, between steps, that a step has several passes."""

    def prepare_adding_up(self) -> str:
        """A warning for people; empty for none, and when it was told before."""
        ...


def tell_notices(model: Any, reporter: Reporter) -> None:
    """Pass on what the model decided since the last time, if it is one that decides."""
    if isinstance(model, GivesNotice):
        for message in model.take_notices():
            reporter.emit(event_pb2.LogEvent(level="info", message=message))


@dataclass(kw_only=True)
class TrainingLoop:
    """One training from `progress` to its end. `model` and `optimizer` are accelerate's prepared ones."""

    accelerator: Any
    model: Any
    optimizer: Any
    data: PlannedData
    settings: training_spec_pb2.Hyperparameters
    objective: Objective
    # What a forward pass holds from now on. A step is the same step whatever it is.
    pass_size: PassSize
    examples_per_epoch: int
    checkpoints: CheckpointKeeper
    progress: TrainingProgress
    device: Device
    switch: StopSwitch
    reporter: Reporter
    # Measures held-out loss and reports it.
    evaluate: Callable[[], None]

    def __post_init__(self) -> None:
        self._schedule = Schedule(
            name=self.settings.schedule.name,
            peak=self.settings.optimizer.learning_rate,
            warmup_steps=self.settings.schedule.warmup_steps,
            num_steps=self.data.num_steps,
        )
        self._trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._updates = make_updates(
            accelerator=self.accelerator,
            optimizer=self.optimizer,
            halts=not self._goes_on_anyway,
        )
        # Oldest first: what waits for each, and gives what it came to.
        self._in_hand: deque[Callable[[], ToldStep]] = deque()
        self._settled_any = False

    def run(self) -> bool:
        """Train to the end and save. True when the time limit ended it early.

        Raises StopRequested (for a checkpoint stop after the checkpoint is committed, or found no room) and RunFailure.
        """
        self.model.train()
        self._teller = StepTeller(
            data=self.data,
            reporter=self.reporter,
            halts=not self._goes_on_anyway,
            background_on=self.accelerator.device if self._updates.steps_ahead else None,
        )
        try:
            with attending_within_sequences(self.model):
                stopped_early = self._train()
        except StopRequested as stop:
            self._settle_at_stop()
            self.reporter.enter_stopping()
            if stop.mode is StopMode.CHECKPOINT:
                self._save_at_stop()
            raise
        finally:
            self._teller.close()
        self.save()
        return stopped_early

    def rehearse(self, steps: Sequence[int], times: int) -> int:
        """Make each of the steps so many times, without a word and saving nothing; the device's peak in bytes so far.

        The weights are no use afterwards. Raises torch.OutOfMemoryError where a run would make its passes smaller.
        """
        self.model.train()
        with attending_within_sequences(self.model):
            for step in (step for step in steps for _ in range(times)):
                self._updates.begin()
                gradient = self._accumulate(self.data.step_examples(step), self.pass_size.limit)
                self._finish(step, 0.0, gradient).read()
        return self.device.peak_bytes()

    @property
    def _goes_on_anyway(self) -> bool:
        return _GOES_ON[self.settings.non_finite_policy or "stop"]

    def _train(self) -> bool:
        # One that a stop cut short is made after the resume: what follows from it must not depend on the stop.
        self._evaluate_if_due()
        while (issued := self.progress.steps_done + len(self._in_hand)) < self.data.num_steps:
            self.switch.check()
            if self._out_of_time():
                self._settle()
                return True
            self._step(issued)
            if any(_is_due(issued + 1, every) for every in self._looked_at_every):
                self._settle()
            self._evaluate_if_due()
            done = self.progress.steps_done
            if _is_due(done, self.settings.save_every_steps) and not self._in_hand and done < self.data.num_steps:
                self.save()
                self.reporter.enter_phase("TRAINING")
        self._settle()
        return False

    @property
    def _looked_at_every(self) -> tuple[int, int]:
        return self.settings.evaluate_every_steps, self.settings.save_every_steps

    def _evaluate_if_due(self) -> None:
        done, evaluations = self.progress.steps_done, self.progress.evaluations
        is_due = _is_due(done, self.settings.evaluate_every_steps) and 0 < done < self.data.num_steps
        if is_due and not self._in_hand and not (evaluations and evaluations[-1]["step"] == done):
            self.evaluate()
            self.reporter.enter_phase("TRAINING")

    def _out_of_time(self) -> bool:
        limit = self.settings.max_duration_seconds
        # At least one step is done, so that there is something to keep.
        return bool(limit) and self.progress.steps_done > 0 and self.progress.training_seconds >= limit

    def _step(self, step: int) -> None:
        """Hand the step out, and wait for those that are due: for this one too where nothing runs ahead."""
        self._updates.begin()
        learning_rate = self._schedule.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        references = self.data.step_examples(step)
        try:
            gradient = self.pass_size.carry_out(
                lambda limit: self._accumulate(references, limit), references, step=step + 1, undo=self._undo
            )
            issued = self._finish(step, learning_rate, gradient)
        except torch.OutOfMemoryError:
            # The steps before it are over all the same; one that was not finite is what the run fails of.
            self._settle()
            raise
        tell_notices(self.model, self.reporter)
        self._in_hand.append(self._teller.hand_over(issued))
        # The first step's numbers are waited for: people wait for them, and kernels are compiled in it.
        self._settle(leaving=self._updates.steps_ahead if self._settled_any else 0)

    def _undo(self) -> None:
        """Drop what a step that ran out of memory had made. What is said of it comes after what came before it."""
        self._settle()
        self.optimizer.zero_grad(set_to_none=True)

    def _settle(self, leaving: int = 0) -> None:
        """Wait for steps in hand, oldest first, until so many are left, and count them. Raises RunFailure."""
        while len(self._in_hand) > leaving:
            self._count(self._in_hand.popleft()())

    def _settle_at_stop(self) -> None:
        """`_settle`, also where the disk has no room for what it says: a stop ends the waiting for some."""
        while self._in_hand:
            with suppress(StopRequested):
                self._settle()

    def _count(self, told: ToldStep) -> None:
        self._settled_any = True
        numbers = told.numbers
        goes_on = numbers.is_finite or self._goes_on_anyway
        if goes_on:
            # A skipped step is a step: its data was shown, and its place in data and schedule is used up.
            self.progress.steps_done = told.issued.step + 1
            self.progress.training_seconds += numbers.seconds
            for batch in told.issued.batches:
                self.progress.count(batch, self.examples_per_epoch)
        self.progress.steps.append(as_history(told.event))
        if told.stop is not None:
            raise told.stop
        if not goes_on:
            # What was handed out after it left the weights alone, and is not told of.
            self._in_hand.clear()
            raise _not_finite(told.problem)

    def _accumulate(self, references: Sequence[ExampleReference], limit: MicroBatchLimit) -> _Gradient:
        """The gradient of a step, clipped, and its losses. May be begun again until the update is made."""
        self.optimizer.zero_grad(set_to_none=True)
        batches = [collate(self.data, part) for part in split(self.data, references, limit)]
        is_told = len(batches) > 1 and isinstance(self.model, PreparesAddingUp)
        if is_told and (problem := self.model.prepare_adding_up()):
            self.reporter.warn(ADDS_UP_ROUGHLY, problem)
        weights = [self.objective.weights(batch) for batch in batches]
        whole = sum(map(sum, weights))
        values = []
        for batch in batches:
            # A step on a slow device takes long; each of its passes is progress.
            self.switch.note_progress()
            outcome = self.objective.forward(self.model, batch.to(self.accelerator.device))
            # Each pass' gradient is of its sum over the weight of the whole step: passes of any size add up to the
            # gradient of the step's mean.
            self.accelerator.backward(outcome.total / max(whole, 1))
            values.append(outcome.values)
        return _Gradient(batches=batches, weights=weights, whole=whole, values=values, norm=self._clip())

    def _finish(self, step: int, learning_rate: float, gradient: _Gradient) -> IssuedStep:
        return IssuedStep(
            step=step,
            batches=gradient.batches,
            weights=gradient.weights,
            learning_rate=learning_rate,
            read=self._updates.apply(gradient.values, gradient.norm, gradient.whole),
            peak_memory_bytes=self.device.peak_bytes(),
        )

    def _clip(self) -> torch.Tensor:
        max_norm = self.settings.optimizer.max_gradient_norm
        return clip_gradient(self.accelerator, self.optimizer, self._trainable, max_norm)

    def save(self) -> None:
        """Commit a checkpoint of the steps done, unless it is there. One for which the disk has no room is left out,
        and said: what was trained goes on in memory, and earlier checkpoints stay. Raises RunFailure.
        """
        try:
            self.checkpoints.save(self.progress)
        except RunFailure as error:
            if error.failure.reason != errors_pb2.ERROR_REASON_DISK_FULL:
                raise
            message = f"no checkpoint of step {self.progress.steps_done}: {error.failure.message}"
            self.reporter.warn(CHECKPOINT_FAILED, message)

    def _save_at_stop(self) -> None:
        """`save`, or a word on what is lost; a disk without room even for its events ends the waiting for some."""
        try:
            self.save()
        finally:
            self.checkpoints.tell_lost_steps(self.progress)


def _is_due(steps_done: int, interval: int) -> bool:
    return interval > 0 and steps_done % interval == 0


def _not_finite(message: str) -> RunFailure:
    return RunFailure(
        failure(reason="NON_FINITE_LOSS", fault="USER", message=message, stage="TRAINING", versions=library_versions())
    )
