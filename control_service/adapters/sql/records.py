"""Rows to domain values and back. No rule lives here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from control_service.adapters.sql.schema import to_microseconds
from control_service.domain.artifact import (
    Artifact,
    ArtifactKind,
    Checkpoint,
    CheckpointStatus,
    files_from_json,
    files_to_json,
)
from control_service.domain.dataset import Dataset, DatasetDraft, DatasetStatistics
from control_service.domain.event import StoredEvent
from control_service.domain.failure import Failure
from control_service.domain.job import Job, JobProgress
from control_service.domain.job_state import JobState
from control_service.domain.node import Node
from control_service.domain.project import Project, ProjectDraft
from control_service.domain.run import Phase, RunState
from control_service.domain.spec import TrainingSpec, Trait

Row = Mapping[str, Any]

_MAX_SPECS: Final = 64
_specs: Final[dict[str, TrainingSpec]] = {}


def draft_to_json(draft: ProjectDraft) -> dict[str, Any]:
    """A project's written fields as JSON."""
    return {
        "name": draft.name,
        "base_model": draft.base_model,
        "model_type": draft.model_type,
        "training_type": draft.training_type,
        "output_directory": draft.output_directory,
        "traits": [trait.to_json() for trait in draft.traits],
        "mix": dict(draft.mix),
        "hyperparameters": dict(draft.hyperparameters),
        "sample_prompts": [dict(prompt) for prompt in draft.sample_prompts],
    }


def project_from_row(row: Row) -> Project:
    """A row of `projects`."""
    draft = dict(row["draft"])
    draft["traits"] = tuple(Trait.from_json(trait) for trait in draft["traits"])
    draft["sample_prompts"] = tuple(draft["sample_prompts"])
    return Project(
        project_id=row["project_id"],
        draft=ProjectDraft(**draft),
        create_time=row["create_time"],
        update_time=row["update_time"],
        etag=row["etag"],
    )


def dataset_to_row(draft: DatasetDraft) -> dict[str, Any]:
    """What was registered as a row of `datasets`, but for its id, name and time."""
    row = {name: getattr(draft, name) for name in DatasetDraft.__dataclass_fields__}
    return {**row, "statistics": None if draft.statistics is None else draft.statistics.to_json()}


def dataset_from_row(row: Row) -> Dataset:
    """A row of `datasets`."""
    statistics = row["statistics"]
    return Dataset(**{**row, "statistics": None if statistics is None else DatasetStatistics.from_json(statistics)})


def job_to_row(job: Job) -> dict[str, Any]:
    """A job as a row of `jobs`, but for what others write: last_sequence is the event log's."""
    row = {name: getattr(job, name) for name in Job.__dataclass_fields__ if name != "last_sequence"}
    row["spec"] = job.spec.to_json()
    row["state"] = job.state.value
    row["phase"] = job.phase.value
    row["progress"] = asdict(job.progress)
    row["failure"] = None if job.failure is None else job.failure.to_json()
    row["run_state"] = None if job.run_state is None else job.run_state.value
    return row


def job_from_row(row: Row) -> Job:
    """A row of `jobs`."""
    values = dict(row)
    values["spec"] = _spec(row["spec_digest"], row["spec"])
    values["state"] = JobState(row["state"])
    values["phase"] = Phase(row["phase"])
    values["progress"] = JobProgress(**row["progress"])
    values["failure"] = None if row["failure"] is None else Failure.from_json(row["failure"])
    values["run_state"] = None if row["run_state"] is None else RunState(row["run_state"])
    return Job(**values)


def _spec(digest: str, value: Any) -> TrainingSpec:
    """The spec that a digest names; of those that were read last, one value for all."""
    spec = _specs.get(digest)
    if spec is None:
        spec = TrainingSpec.from_json(value)
        if len(_specs) >= _MAX_SPECS:
            _specs.clear()
        _specs[digest] = spec
    return spec


def event_to_driver(job_id: str, event: StoredEvent) -> tuple[Any, ...]:
    """An event as a row of `events`, in the order of its columns, with the values that a driver takes."""
    return (
        job_id,
        event.sequence,
        event.attempt,
        event.run_sequence or None,
        int(event.kind),
        to_microseconds(event.time),
        event.payload,
    )


def event_from_row(row: Row) -> StoredEvent:
    """A row of `events`."""
    return StoredEvent(
        sequence=row["sequence"],
        attempt=row["attempt"],
        run_sequence=row["run_sequence"] or 0,
        kind=row["kind"],
        time=row["time"],
        payload=row["payload"],
    )


def checkpoint_to_row(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as a row."""
    row = {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}
    return {**row, "status": checkpoint.status.value, "files": files_to_json(checkpoint.files)}


def checkpoint_from_row(row: Row) -> Checkpoint:
    """A row of `checkpoints`."""
    return Checkpoint(**{**row, "status": CheckpointStatus(row["status"]), "files": files_from_json(row["files"])})


def artifact_to_row(artifact: Artifact) -> dict[str, Any]:
    """An artifact as a row."""
    row = {name: getattr(artifact, name) for name in Artifact.__dataclass_fields__}
    return {**row, "kind": artifact.kind.value, "files": files_to_json(artifact.files)}


def artifact_from_row(row: Row) -> Artifact:
    """A row of `artifacts`."""
    return Artifact(**{**row, "kind": ArtifactKind(row["kind"]), "files": files_from_json(row["files"])})


def node_from_row(row: Row) -> Node:
    """A row of `nodes`."""
    return Node(**row)
