"""A run's checkpoints while it goes on: certifies and writes them, tells of them, deletes those that are not kept, and
goes on from one of an earlier attempt. What is in a checkpoint, and which ones stay, is decided elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_service.domain.planned_data import PlannedData
from gpu_service.domain.trainer import REFERENCE
from gpu_service.engine import durable
from gpu_service.engine.failures import RunFailure
from gpu_service.engine.pace import NOBODY, Pace
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.stopping import StopRequested
from gpu_service.engine.training import certificate, checkpoint, retention
from gpu_service.engine.training.certificate import Certificate, Environment
from gpu_service.engine.training.objectives import Objective
from gpu_service.engine.training.probe import measure_probe
from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.journal import STEPS_LOST, JournalFull
from gpu_service.journal.failpoints import failpoint
from tunesmith.common.v1 import event_pb2, file_pb2, training_spec_pb2


@dataclass(kw_only=True)
class CheckpointKeeper:
    """`model` is as it is trained: accelerate's prepared one. `scaler` is None unless gradients are scaled."""

    directory: Path
    identity: checkpoint.Identity
    settings: training_spec_pb2.Hyperparameters
    model: Any
    unwrapped_model: Any
    optimizer: Any
    scaler: Any
    data: PlannedData
    objective: Objective
    device: torch.device
    reporter: Reporter
    pace: Pace = NOBODY

    def __post_init__(self) -> None:
        self._saved_step = 0
        quantization = self.settings.quantization
        self._environment = Environment.here(
            device=self.device,
            compute_dtype=quantization.compute_dtype,
            quantization=quantization.method,
            trainer=self.settings.trainer or REFERENCE,
        )

    def resume(self, directory: Path, source: Path | None = None) -> TrainingProgress:
        """Go on from a checkpoint and tell of it. `source` is the earlier attempt's, whose files `directory` links; it
        is set aside when one of them is damaged. Raises RunFailure RESUME_MISMATCH.
        """
        try:
            restored = checkpoint.restore(
                directory,
                identity=self.identity,
                model=self.unwrapped_model,
                optimizer=self.optimizer,
                scaler=self.scaler,
                device=self.device,
                measure=self._measure,
                pace=self.pace,
            )
        except RunFailure as error:
            if checkpoint.is_damage(error.failure):
                self._set_aside(source, error.failure.message)
            raise
        progress = restored.progress
        self._saved_step = progress.steps_done
        self.reporter.emit(
            event_pb2.ResumedEvent(
                from_step=progress.steps_done,
                checkpoint=checkpoint.name_of(progress.steps_done),
                saved_probe_loss=restored.saved.probe_loss,
                measured_probe_loss=restored.measured.probe_loss,
            )
        )
        return progress

    def _set_aside(self, source: Path | None, problem: str) -> None:
        """A copy, or an earlier checkpoint, may do; this one must not be taken for whole again."""
        try:
            aside = durable.set_aside(source) if source is not None else None
        except OSError as error:
            problem += f"; it could not be set aside: {error}"
        else:
            problem += f"; it was set aside as {aside.name}" if aside is not None else ""
        self.reporter.warn("checkpoint-damaged", problem)

    def save(self, progress: TrainingProgress) -> None:
        """Commit a checkpoint of the steps done, unless it is there; then delete those beyond the settings.

        Raises RunFailure CHECKPOINT_WRITE or DISK_FULL.
        """
        if progress.steps_done == self._saved_step:
            return
        self.reporter.enter_phase("SAVING")
        start = time.monotonic()
        best_before = progress.best_held_out_loss
        held_out = take_held_out(progress)
        measured = self._measure()
        try:
            saved = checkpoint.save(
                self.directory,
                identity=self.identity,
                certificate=measured,
                held_out=held_out,
                model=self.unwrapped_model,
                optimizer=self.optimizer,
                scaler=self.scaler,
                progress=progress,
                device=self.device,
                trainer=self.settings.trainer or REFERENCE,
                pace=self.pace,
            )
        except RunFailure:
            # One that is not there is not the best.
            progress.best_held_out_loss = best_before
            raise
        self._saved_step = progress.steps_done
        failpoint("checkpoint.before-event")
        self.reporter.emit(
            event_pb2.CheckpointEvent(
                name=saved.name,
                step=saved.step,
                status=event_pb2.CHECKPOINT_STATUS_COMMITTED,
                size_bytes=saved.size_bytes,
                manifest_sha256=saved.manifest_sha256,
                files=[
                    file_pb2.FileReference(path=stored.path, sha256=stored.sha256, size_bytes=stored.size_bytes)
                    for stored in saved.files
                ],
                seconds=time.monotonic() - start,
                probe_loss=measured.probe_loss,
                held_out_loss=held_out.loss,
                best=held_out.best,
            )
        )
        deleted = retention.prune(
            self.directory, keep=self.settings.keep_checkpoints, keep_best=self.settings.keep_best_checkpoint
        )
        for one in deleted:
            self.reporter.emit(
                event_pb2.CheckpointEvent(name=one.name, step=one.step, status=event_pb2.CHECKPOINT_STATUS_DELETED)
            )

    def tell_lost_steps(self, progress: TrainingProgress) -> None:
        """Behind a stop that was to write a checkpoint: says which steps are in none, if any are."""
        if progress.steps_done == self._saved_step:
            return
        what = f"what was trained after step {self._saved_step}" if self._saved_step else "all that was trained"
        message = f"stopped at step {progress.steps_done}, of which no checkpoint could be written: {what} is lost"
        # Room of the closing events; where there is not even that, nobody waits behind the end.
        with suppress(JournalFull, StopRequested):
            self.reporter.warn(STEPS_LOST, message)

    def _measure(self) -> Certificate:
        return certificate.measure(
            model=self.unwrapped_model,
            optimizer=self.optimizer,
            probe_loss=measure_probe(self.model, self.data, self.objective, self.device),
            environment=self._environment,
            pace=self.pace,
        )


def take_held_out(progress: TrainingProgress) -> checkpoint.HeldOut:
    """The newest held-out loss of the training, and whether it is the lowest that a checkpoint of it had so far.

    What was measured on the base, before the first step, is no checkpoint's.
    """
    losses = [entry["loss"] for entry in progress.evaluations if entry["step"] > 0 and entry["loss"] is not None]
    newest = losses[-1] if losses else None
    lowest = progress.best_held_out_loss
    best = newest is not None and (lowest is None or newest < lowest)
    if best:
        progress.best_held_out_loss = newest
    return checkpoint.HeldOut(loss=newest, best=best)
