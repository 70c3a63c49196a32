"""Checkpoints: all that a training needs to go on as if it had never stopped. Tensors as safetensors, the rest as JSON.

A checkpoint is staged, fsynced, its manifest with the SHA-256 of each file written last, then renamed. Refuses to
resume from files that are damaged or of another plan. Never reads or writes a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpu_service.engine import durable
from gpu_service.engine.failures import RunFailure, from_exception, library_versions
from gpu_service.engine.training import random_state
from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.journal.events import failure

_VERSION = 2
WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_TENSORS_FILE = "optimizer.safetensors"
OPTIMIZER_FILE = "optimizer.json"
RANDOM_TENSORS_FILE = "random.safetensors"
TRAINER_FILE = "trainer.json"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What must be equal for a checkpoint to belong to a run."""

    data_digest: str
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


def name_of(step: int) -> str:
    """`step-00000020` for step 20."""
    return f"step-{step:08d}"


def save(
    directory: Path, *, identity: Identity, model: Any, optimizer: Any, scaler: Any, progress: TrainingProgress
) -> Checkpoint:
    """Write the checkpoint of `progress.steps_done` below `directory`; `scaler` is None unless gradients are scaled.

    Raises RunFailure CHECKPOINT_WRITE or DISK_FULL.
    """
    name = name_of(progress.steps_done)
    try:
        with durable.staged(directory / name) as staging:
            save_file(dict(_trainable(model)), staging / WEIGHTS_FILE)
            _save_optimizer(optimizer, staging)
            random_tensors, random_values = random_state.capture()
            save_file(random_tensors, staging / RANDOM_TENSORS_FILE)
            trainer = {
                "random": random_values,
                "scaler": None if scaler is None else scaler.state_dict(),
                "progress": progress.to_json(),
            }
            (staging / TRAINER_FILE).write_text(json.dumps(trainer), encoding="utf-8")
            files = durable.list_files(staging)
            facts = {"version": _VERSION, "step": progress.steps_done, **vars(identity)}
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


def restore(directory: Path, *, identity: Identity, model: Any, optimizer: Any, scaler: Any) -> TrainingProgress:
    """Put a checkpoint into `model`, `optimizer`, `scaler` and the generators. Raises RunFailure RESUME_MISMATCH.

    Nothing is changed before every file was verified and compared with the run.
    """
    try:
        manifest = durable.read_manifest(directory)
        _compare(manifest, identity)
        weights = load_file(directory / WEIGHTS_FILE)
        expected = dict(_trainable(model))
        _compare_tensors(weights, expected)
        optimizer_state = _load_optimizer(directory)
        trainer = json.loads((directory / TRAINER_FILE).read_text(encoding="utf-8"))
        progress = TrainingProgress.from_json(trainer["progress"])
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(weights[name])
        optimizer.load_state_dict(optimizer_state)
        if scaler is not None:
            scaler.load_state_dict(trainer["scaler"])
        random_state.restore(load_file(directory / RANDOM_TENSORS_FILE), trainer["random"])
    except durable.DamagedDirectory as error:
        raise _mismatch(str(error), directory, error.file) from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _mismatch(f"{type(error).__name__}: {error}", directory) from error
    return progress


def prune(directory: Path, keep: int) -> list[tuple[str, int]]:
    """Delete all but the newest `keep` checkpoints, oldest first; the newest is never deleted.

    Name and step of each.
    """
    found = sorted(
        (int(path.name.removeprefix("step-")), path)
        for path in directory.glob("step-*")
        if (path / durable.MANIFEST_FILE).is_file()
    )
    doomed = found[: -max(keep, 1)]
    for _, path in doomed:
        durable.delete(path)
    return [(path.name, step) for step, path in doomed]


def _trainable(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()


def _save_optimizer(optimizer: Any, staging: Path) -> None:
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    save_file(tensors, staging / OPTIMIZER_TENSORS_FILE)
    document = {"values": values, "param_groups": state["param_groups"]}
    (staging / OPTIMIZER_FILE).write_text(json.dumps(document), encoding="utf-8")


def _load_optimizer(directory: Path) -> dict[str, Any]:
    document = json.loads((directory / OPTIMIZER_FILE).read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in document["values"].items()}
    for key, tensor in load_file(directory / OPTIMIZER_TENSORS_FILE).items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": document["param_groups"]}


def _compare(manifest: dict[str, Any], identity: Identity) -> None:
    wanted = {"version": _VERSION, **vars(identity)}
    for name, value in wanted.items():
        if manifest.get(name) != value:
            raise ValueError(f"the checkpoint's {name} is {manifest.get(name)!r}; the run's is {value!r}")


def _compare_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[:3]
        raise ValueError(f"the checkpoint's trained tensors are not the model's, e.g. {', '.join(odd)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ValueError(f"the checkpoint's {name} is {tensor.dtype} {tuple(tensor.shape)}")


def _mismatch(message: str, directory: Path, file: str = durable.MANIFEST_FILE) -> RunFailure:
    return RunFailure(
        failure(
            reason="RESUME_MISMATCH",
            fault="PLATFORM",
            message=f"cannot resume from {directory.name}: {message}",
            file=f"checkpoints/{directory.name}/{file}",
            versions=library_versions(),
        )
    )
