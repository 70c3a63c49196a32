"""Writes a run's artifacts, all of them or none; a table says what is written for which method.

The whole of `artifacts/` is staged, fsynced and renamed, with the `manifest.json` that lists it, so that a run that is
stopped while it saves leaves nothing. Paths in events and manifest are relative to the artifact's own directory. An
export that was refused is left out, and beside what was trained here also one that cannot be made; the rest stands.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gpu_service.engine import durable, room
from gpu_service.engine.artifacts import exporting, model_card, report
from gpu_service.engine.artifacts.export_source import ExportSource
from gpu_service.engine.failures import RunFailure, from_exception
from gpu_service.engine.pace import NOBODY, Pace, in_one_piece
from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.journal.failpoints import failpoint
from tunesmith.common.v1 import event_pb2, file_pb2, plan_pb2, training_spec_pb2

# What saving raises when a disk, a tensor or a template is not as it should be.
_RAISES = (OSError, SafetensorError, ValueError, RuntimeError)
_LICENSE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


@dataclass(frozen=True, kw_only=True)
class ArtifactRequest:
    """Everything that artifacts are made from."""

    directory: Path
    model_directory: Path
    job_id: str
    spec: training_spec_pb2.TrainingSpec
    plan: plan_pb2.Plan
    trains_adapter: bool
    model: Any
    tokenizer: Any
    # Type that a full model is saved in: the base's own.
    stored_dtype: torch.dtype | None
    progress: TrainingProgress
    stopped_early: bool
    versions: dict[str, str]
    # What exports are made from; None when there are none to make.
    export_source: ExportSource | None = None
    # False: nothing was trained here, and only exports are written.
    trained: bool = True
    # The card of the adapter that was started from, when nothing was trained here.
    earlier_card: str = ""


@dataclass(frozen=True, kw_only=True)
class WrittenArtifacts:
    """What was written, in order; how every export compared, refused ones too; and why others could not be made."""

    artifacts: list[event_pb2.ArtifactEvent]
    exports: list[event_pb2.ExportEvent]
    problems: list[str]


@dataclass(frozen=True, kw_only=True)
class _Writing:
    request: ArtifactRequest
    # May raise to stop; called before each artifact and inside long ones.
    check: Callable[[], None]
    exports: list[event_pb2.ExportEvent] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Artifact:
    name: str
    kind: event_pb2.ArtifactKind.ValueType
    # Writes into an empty directory; False when nothing of it is to be kept.
    write: Callable[[_Writing, Path], bool]
    is_wanted: Callable[[ArtifactRequest], bool]
    # What its tensors take at least; asked for before the first byte.
    least_bytes: Callable[[ArtifactRequest], int] = lambda request: 0


@dataclass(frozen=True, kw_only=True)
class _Listed:
    artifact: _Artifact
    files: list[durable.StoredFile]

    def as_json(self) -> dict[str, Any]:
        kind = event_pb2.ArtifactKind.Name(self.artifact.kind).removeprefix("ARTIFACT_KIND_")
        return {"name": self.artifact.name, "kind": kind, "files": [asdict(stored) for stored in self.files]}

    def as_event(self) -> event_pb2.ArtifactEvent:
        return event_pb2.ArtifactEvent(
            name=self.artifact.name,
            kind=self.artifact.kind,
            files=[file_pb2.FileReference(**asdict(stored)) for stored in self.files],
        )


def write_all(request: ArtifactRequest, check: Callable[[], None], pace: Pace = NOBODY) -> WrittenArtifacts:
    """Write every artifact that the run leaves, and their manifest. `check` may raise to stop: nothing is left.

    Raises RunFailure EXPORT or DISK_FULL naming the artifact.
    """
    writing = _Writing(request=request, check=check)
    name = ""
    try:
        with durable.staged(request.directory, pace) as staging:
            listed: list[_Listed] = []
            for artifact in _ARTIFACTS:
                if not artifact.is_wanted(request):
                    continue
                check()
                name = artifact.name
                (staging / name).mkdir()
                least_bytes = artifact.least_bytes(request)
                with room.required(staging, least_bytes), in_one_piece(pace, least_bytes):
                    is_kept = artifact.write(writing, staging / name)
                if is_kept:
                    listed.append(_Listed(artifact=artifact, files=durable.list_files(staging / name, pace)))
                else:
                    shutil.rmtree(staging / name)
            name = durable.MANIFEST_FILE
            text = json.dumps({"artifacts": [entry.as_json() for entry in listed]}, indent=1)
            failpoint("artifacts.before-manifest")
            (staging / name).write_text(text, encoding="utf-8")
    except _RAISES as error:
        raise _failure(error, name) from error
    return WrittenArtifacts(
        artifacts=[entry.as_event() for entry in listed], exports=writing.exports, problems=writing.problems
    )


def _failure(error: Exception, name: str) -> RunFailure:
    return RunFailure(
        from_exception(error, reason="EXPORT", fault="PLATFORM", stage="SAVING", file=f"artifacts/{name}")
    )


def _write_adapter(writing: _Writing, directory: Path) -> bool:
    # Embeddings are never trained or resized; told so, PEFT has no reason to ask a hub about the base.
    writing.request.model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    writing.request.tokenizer.save_pretrained(directory)
    _write_common(writing, directory, model_card.Kind.ADAPTER)
    return True


def _write_merged(writing: _Writing, directory: Path) -> bool:
    source = writing.request.export_source
    assert source is not None
    try:
        event = exporting.write(
            "merged",
            source,
            directory,
            threshold=writing.request.plan.resolved.max_export_logit_difference,
            check=writing.check,
        )
    except (SafetensorError, ValueError, RuntimeError) as error:
        # A full disk would fail the rest too. All else (device memory, a layer that the base's files lack) is this
        # export's alone, and costs nothing of what was trained.
        if not writing.request.trained:
            raise
        writing.problems.append(f"export 'merged' could not be made: {type(error).__name__}: {error}")
        return False
    writing.exports.append(event)
    _write_common(writing, directory, model_card.Kind.MERGED)
    return event.accepted


def _write_model(writing: _Writing, directory: Path) -> bool:
    request = writing.request
    model = request.model
    if request.stored_dtype is not None:
        model = model.to(request.stored_dtype)
    model.save_pretrained(directory)
    generation = request.model_directory / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, directory / generation.name)
    request.tokenizer.save_pretrained(directory)
    _write_common(writing, directory, model_card.Kind.MODEL)
    return True


def _write_common(writing: _Writing, directory: Path, kind: model_card.Kind) -> None:
    request = writing.request
    for name in _LICENSE_NAMES:
        if (request.model_directory / name).is_file():
            shutil.copyfile(request.model_directory / name, directory / name)
    card = model_card.render(
        kind=kind,
        spec=request.spec,
        plan=request.plan,
        progress=request.progress,
        job_id=request.job_id,
        stored_dtype=request.stored_dtype,
        stopped_early=request.stopped_early,
        versions=request.versions,
        exports=writing.exports,
        earlier_card=request.earlier_card,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def _write_report(writing: _Writing, directory: Path) -> bool:
    request = writing.request
    metrics = report.collect(
        spec=request.spec,
        plan=request.plan,
        progress=request.progress,
        job_id=request.job_id,
        stopped_early=request.stopped_early,
        versions=request.versions,
        exports=writing.exports,
    )
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    if request.trained:
        report.plot(request.progress, directory / "loss.png", objective=request.plan.resolved.objective)
    return True


def _adapter_bytes(request: ArtifactRequest) -> int:
    trained = (parameter for parameter in request.model.parameters() if parameter.requires_grad)
    return sum(parameter.numel() * parameter.element_size() for parameter in trained)


def _model_bytes(request: ArtifactRequest) -> int:
    stored = request.stored_dtype
    return sum(
        parameter.numel() * (parameter.element_size() if stored is None else stored.itemsize)
        for parameter in request.model.parameters()
    )


_ARTIFACTS: tuple[_Artifact, ...] = (
    _Artifact(
        name="adapter",
        kind=event_pb2.ARTIFACT_KIND_ADAPTER,
        write=_write_adapter,
        is_wanted=lambda request: request.trains_adapter and request.trained,
        least_bytes=_adapter_bytes,
    ),
    _Artifact(
        name="merged",
        kind=event_pb2.ARTIFACT_KIND_MERGED,
        write=_write_merged,
        is_wanted=lambda request: "merged" in request.plan.resolved.exports,
    ),
    # After the exports, whose comparisons it holds.
    _Artifact(
        name="report",
        kind=event_pb2.ARTIFACT_KIND_REPORT,
        write=_write_report,
        is_wanted=lambda request: True,
    ),
    # Last, because saving in the base's own type changes the model.
    _Artifact(
        name="model",
        kind=event_pb2.ARTIFACT_KIND_MODEL,
        write=_write_model,
        is_wanted=lambda request: not request.trains_adapter,
        least_bytes=_model_bytes,
    ),
)
