"""Checkpoints: all that a training needs to go on as if it had never stopped. Tensors as safetensors, the rest as JSON.

A checkpoint is staged, fsynced, its manifest with the SHA-256 of each file written last, then renamed. Refuses to
resume from files that are damaged or of another plan, and where the certificate does not hold. Never reads or writes a
pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpu_service.engine import durable, room
from gpu_service.engine.failures import RunFailure, from_exception, library_versions
from gpu_service.engine.pace import NOBODY, Pace, in_one_piece
from gpu_service.engine.training import optimizer_state, random_state
from gpu_service.engine.training.certificate import Certificate, CertificateBroken, trained_tensors
from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.journal.events import failure
from tunesmith.common.v1 import errors_pb2

_VERSION = 4
WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_TENSORS_FILE = "optimizer.safetensors"
OPTIMIZER_FILE = "optimizer.json"
RANDOM_TENSORS_FILE = "random.safetensors"
TRAINER_FILE = "trainer.json"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What must be equal for a checkpoint to belong to a run."""

    data_digest: str
    spec_digest: str
    weights_digest: str
    training_type: str
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint; `files` has the manifest too."""

    name: str
    step: int
    size_bytes: int
    manifest_sha256: str
    files: tuple[durable.StoredFile, ...]


@dataclass(frozen=True, kw_only=True)
class Restored:
    """How far the training was, and its certificate as it was saved and as it was measured again."""

    progress: TrainingProgress
    saved: Certificate
    measured: Certificate


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Newest held-out loss, None when none was measured; `best`: no earlier checkpoint's was as low."""

    loss: float | None
    best: bool


def name_of(step: int) -> str:
    """`step-00000020` for step 20."""
    return f"step-{step:08d}"


def save(
    directory: Path,
    *,
    identity: Identity,
    certificate: Certificate,
    held_out: HeldOut,
    model: Any,
    optimizer: Any,
    scaler: Any,
    progress: TrainingProgress,
    device: torch.device,
    trainer: str,
    pace: Pace = NOBODY,
) -> Checkpoint:
    """Write the checkpoint of `progress.steps_done` below `directory`; `scaler` is None unless gradients are scaled.

    `certificate` is of what `model` and `optimizer` hold now. Raises RunFailure CHECKPOINT_WRITE or DISK_FULL.
    """
    name = name_of(progress.steps_done)
    try:
        with durable.staged(directory / name, pace) as staging:
            weights, state = dict(trained_tensors(model)), optimizer_state.flatten(optimizer)
            # Nothing is written that would only fill the disk: the run's events need room too.
            with room.required(staging, room.tensors_bytes(weights) + room.tensors_bytes(state.tensors)):
                with in_one_piece(pace, room.tensors_bytes(weights)):
                    save_file(weights, staging / WEIGHTS_FILE)
                with in_one_piece(pace, room.tensors_bytes(state.tensors)):
                    save_file(optimizer_state.apart(state.tensors), staging / OPTIMIZER_TENSORS_FILE)
            (staging / OPTIMIZER_FILE).write_text(json.dumps(state.document()), encoding="utf-8")
            random_tensors, random_values = random_state.capture(device)
            save_file(random_tensors, staging / RANDOM_TENSORS_FILE)
            state_of_training = {
                "random": random_values,
                "scaler": None if scaler is None else scaler.state_dict(),
                "progress": progress.to_json(),
            }
            (staging / TRAINER_FILE).write_text(json.dumps(state_of_training), encoding="utf-8")
            files = durable.list_files(staging, pace)
            facts = {
                "version": _VERSION,
                "step": progress.steps_done,
                # Index of the planned step that comes next, from 0. The learning rate follows from it too.
                "next_step": progress.steps_done,
                **vars(identity),
                # No part of the identity: either goes on from what the other left.
                "trainer": trainer,
                "certificate": certificate.to_json(),
                "held_out_loss": held_out.loss,
                "best": held_out.best,
            }
            manifest = durable.write_manifest(staging, facts, files)
    except (OSError, SafetensorError) as error:
        raise RunFailure(
            from_exception(
                error, reason="CHECKPOINT_WRITE", fault="PLATFORM", stage="SAVING", file=f"checkpoints/{name}"
            )
        ) from error
    everything = (*files, manifest)
    return Checkpoint(
        name=name,
        step=progress.steps_done,
        size_bytes=sum(stored.size_bytes for stored in everything),
        manifest_sha256=manifest.sha256,
        files=everything,
    )


def is_damage(failure: errors_pb2.Failure) -> bool:
    """Whether `restore` failed because a file is not what was written."""
    return failure.reason == errors_pb2.ERROR_REASON_RESUME_MISMATCH and failure.fault == errors_pb2.FAULT_HARDWARE


class _Contradiction(Exception):
    """A fact of the manifest that is not the run's."""

    def __init__(self, what: str, saved: object, measured: object) -> None:
        super().__init__(f"the checkpoint's {what} is {saved!r}; the run's is {measured!r}")
        self.what = what
        self.saved = str(saved)
        self.measured = str(measured)


def restore(
    directory: Path,
    *,
    identity: Identity,
    model: Any,
    optimizer: Any,
    scaler: Any,
    device: torch.device,
    measure: Callable[[], Certificate],
    pace: Pace = NOBODY,
) -> Restored:
    """Put a checkpoint into `model`, `optimizer`, `scaler` and the generators, and compare what `measure` says of them.

    Nothing is changed before every file was verified and compared with the run. Raises RunFailure RESUME_MISMATCH, with
    fault HARDWARE where a file is damaged (another checkpoint may do), else PLATFORM; `details` has `checkpoint` and,
    of what differs, `what`, `saved` and `measured`.
    """
    try:
        manifest = durable.read_manifest(directory, pace)
        saved = _certificate(manifest)
        _compare(manifest, identity)
        with in_one_piece(pace, (directory / WEIGHTS_FILE).stat().st_size):
            weights = load_file(directory / WEIGHTS_FILE)
        expected = dict(trained_tensors(model))
        _compare_tensors(weights, expected)
        trainer = json.loads((directory / TRAINER_FILE).read_text(encoding="utf-8"))
        progress = TrainingProgress.from_json(trainer["progress"])
        if progress.steps_done != manifest["next_step"]:
            raise _Contradiction("next_step", manifest["next_step"], progress.steps_done)
        optimizer_document = json.loads((directory / OPTIMIZER_FILE).read_text(encoding="utf-8"))
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(weights[name])
        with in_one_piece(pace, (directory / OPTIMIZER_TENSORS_FILE).stat().st_size):
            optimizer_state.load(optimizer, optimizer_document, load_file(directory / OPTIMIZER_TENSORS_FILE))
        if scaler is not None:
            scaler.load_state_dict(trainer["scaler"])
        measured = measure()
        saved.compare(measured)
        # Last, so that nothing which was measured can have drawn from the generators.
        random_state.restore(load_file(directory / RANDOM_TENSORS_FILE), trainer["random"], device)
    except torch.OutOfMemoryError:
        # Says nothing of the checkpoint; whoever ends the run knows what it means.
        raise
    except durable.DamagedDirectory as error:
        raise _mismatch(str(error), directory, fault="HARDWARE", file=error.file) from error
    except (_Contradiction, CertificateBroken) as error:
        details = {"what": error.what, "saved": error.saved, "measured": error.measured}
        raise _mismatch(str(error), directory, details=details) from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _mismatch(f"{type(error).__name__}: {error}", directory) from error
    return Restored(progress=progress, saved=saved, measured=measured)


def _certificate(manifest: dict[str, Any]) -> Certificate:
    try:
        return Certificate.from_json(manifest["certificate"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise durable.DamagedDirectory(durable.MANIFEST_FILE, f"{type(error).__name__}: {error}") from error


def _compare(manifest: dict[str, Any], identity: Identity) -> None:
    wanted = {"version": _VERSION, **vars(identity)}
    for what, value in wanted.items():
        if manifest.get(what) != value:
            raise _Contradiction(what, manifest.get(what), value)


def _compare_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[:3]
        raise ValueError(f"the checkpoint's trained tensors are not the model's, e.g. {', '.join(odd)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ValueError(f"the checkpoint's {name} is {tensor.dtype} {tuple(tensor.shape)}")


def _mismatch(
    message: str,
    directory: Path,
    *,
    fault: str = "PLATFORM",
    file: str = durable.MANIFEST_FILE,
    details: dict[str, str] | None = None,
) -> RunFailure:
    return RunFailure(
        failure(
            reason="RESUME_MISMATCH",
            fault=fault,
            message=f"cannot resume from {directory.name}: {message}",
            file=f"checkpoints/{directory.name}/{file}",
            versions=library_versions(),
            details={"checkpoint": directory.name, **(details or {})},
        )
    )
