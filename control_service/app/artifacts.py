"""Use cases of artifacts: list, open a file, delete."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from control_service.app.idempotency import RequestKey
from control_service.app.ports import BlobStore, Clock
from control_service.app.store_ports import Store
from control_service.domain.artifact import Artifact


async def list_artifacts(job_id: str, *, store: Store) -> Sequence[Artifact]:
    """A job's collected artifacts by name. NotFound JOB_NOT_FOUND."""
    raise NotImplementedError


async def open_artifact_file(
    job_id: str, name: str, path: str, *, offset: int = 0, store: Store, blobs: BlobStore
) -> AsyncIterator[bytes]:
    """Chunks of one file of an artifact, of at most 1 MiB. NotFound ARTIFACT_NOT_FOUND; OutOfRange INVALID_FIELD when
    the offset lies beyond the end. Awaiting it checks; iterating its result reads."""
    raise NotImplementedError


async def delete_artifact(
    job_id: str, name: str, *, store: Store, blobs: BlobStore, clock: Clock, request: RequestKey | None = None
) -> None:
    """Deletes an artifact's record, output directory and unshared bytes. NotFound ARTIFACT_NOT_FOUND."""
    raise NotImplementedError
