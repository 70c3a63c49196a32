"""Finds what an earlier job left for a new one to start from: bytes that control has, of the same base.

The new job's record holds these bytes from the transaction that writes it, so that the earlier job, its artifacts and
checkpoints may go while it waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from control_service.app.lookups import job_of
from control_service.app.store_ports import Transaction
from control_service.domain.artifact import ArtifactKind, CheckpointStatus, FileReference
from control_service.domain.errors import InvalidArgument, NotFound
from control_service.domain.job import Job
from control_service.domain.start_from import start_from

# What training leaves, by the kind of its artifact.
_TRAINED = (ArtifactKind.ADAPTER, ArtifactKind.MODEL)


@dataclass(frozen=True, kw_only=True)
class StartRequest:
    """What to start from. `checkpoint` empty: what the job trained."""

    job_id: str
    checkpoint: str = ""


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """`value` is the spec's `start_from`. The base is pinned to the weights that the earlier job had."""

    earlier: Job
    value: Mapping[str, Any]

    @property
    def weights_digest(self) -> str:
        """Empty when the earlier job was never dispatched."""
        return self.earlier.weights_digest


def find_start(tx: Transaction, request: StartRequest) -> StartPoint:
    """NotFound JOB_NOT_FOUND, ARTIFACT_NOT_FOUND, CHECKPOINT_NOT_FOUND."""
    earlier = job_of(tx, request.job_id)
    name, files = _checkpoint(tx, earlier, request.checkpoint) if request.checkpoint else _trained(tx, earlier)
    return StartPoint(earlier=earlier, value=start_from(earlier.spec, job_id=earlier.job_id, name=name, files=files))


def check_same_base(start: StartPoint, base_model: str) -> None:
    """InvalidArgument COMBINATION_NOT_ALLOWED with both bases."""
    before = start.earlier.spec.base_model
    if before != base_model:
        raise InvalidArgument(
            "COMBINATION_NOT_ALLOWED",
            f"the project's base is {base_model}, and job {start.earlier.job_id} trained {before}",
            details={"field": "start_from_job_id", "wanted": base_model, "found": before},
        )


def _trained(tx: Transaction, job: Job) -> tuple[str, tuple[FileReference, ...]]:
    artifacts = tx.artifacts.list_for_job(job.job_id)
    for artifact in artifacts:
        if artifact.kind in _TRAINED:
            return artifact.name, artifact.files
    raise NotFound(
        "ARTIFACT_NOT_FOUND",
        f"job {job.job_id} is {job.state} and left neither an adapter nor a model",
        details={"state": job.state.value, "artifacts": ",".join(artifact.name for artifact in artifacts)},
    )


def _checkpoint(tx: Transaction, job: Job, name: str) -> tuple[str, tuple[FileReference, ...]]:
    checkpoints = tx.checkpoints.list_for_job(job.job_id)
    for checkpoint in checkpoints:
        if checkpoint.name == name and checkpoint.status is CheckpointStatus.REPLICATED:
            return checkpoint.name, checkpoint.files
    there = ",".join(c.name for c in checkpoints if c.status is CheckpointStatus.REPLICATED)
    raise NotFound(
        "CHECKPOINT_NOT_FOUND",
        f"control has no copy of checkpoint {name} of job {job.job_id}; it has: {there or 'none'}",
        details={"checkpoints": there},
    )
