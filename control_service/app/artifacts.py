"""Use cases of artifacts: list, open a file, delete."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from control_service.app.content import free_unnamed
from control_service.app.idempotency import RequestKey, earlier_reference, once
from control_service.app.lookups import job_of
from control_service.app.ports import BlobStore, Clock
from control_service.app.store_ports import Store, Transaction
from control_service.domain.artifact import Artifact
from control_service.domain.errors import NotFound, OutOfRange


async def list_artifacts(job_id: str, *, store: Store) -> Sequence[Artifact]:
    """A job's collected artifacts by name. NotFound JOB_NOT_FOUND."""

    def read(tx: Transaction) -> Sequence[Artifact]:
        job_of(tx, job_id)
        return tx.artifacts.list_for_job(job_id)

    return await store.read(read)


async def open_artifact_file(
    job_id: str, name: str, path: str, *, offset: int = 0, store: Store, blobs: BlobStore
) -> AsyncIterator[bytes]:
    """Chunks of one file of an artifact, of at most 1 MiB. NotFound ARTIFACT_NOT_FOUND; OutOfRange INVALID_FIELD when
    the offset lies beyond the end. Awaiting it checks; iterating its result reads."""
    artifact = await store.read(lambda tx: _artifact_of(tx, job_id, name))
    file = next((file for file in artifact.files if file.path == path), None)
    if file is None:
        raise NotFound(
            "ARTIFACT_NOT_FOUND",
            f"artifact {name} of job {job_id} has no file {path!r}",
            details={"files": ",".join(file.path for file in artifact.files)},
        )
    if offset > file.size_bytes:
        raise OutOfRange(
            "INVALID_FIELD", f"offset: {path} has {file.size_bytes} bytes", details={"size_bytes": str(file.size_bytes)}
        )
    return blobs.read(file.sha256, offset=offset)


async def delete_artifact(
    job_id: str, name: str, *, store: Store, blobs: BlobStore, clock: Clock, request: RequestKey | None = None
) -> None:
    """Deletes an artifact's record, output directory and unshared bytes. NotFound ARTIFACT_NOT_FOUND."""
    now = clock.utc_now()

    def look(tx: Transaction) -> str:
        return "" if earlier_reference(tx, request) is not None else _artifact_of(tx, job_id, name).path

    def work(tx: Transaction) -> Sequence[str]:
        """The contents that lost a holder."""

        def delete() -> tuple[str, Sequence[str]]:
            artifact = _artifact_of(tx, job_id, name)
            tx.artifacts.delete(job_id, name)
            return "", sorted({file.sha256 for file in artifact.files})

        return once(tx, request, now, work=delete, replay=lambda _: ())

    # As with jobs: the output goes before its record.
    if path := await store.read(look):
        await blobs.remove_output(path=path)
    await free_unnamed(await store.transact(work), store=store, blobs=blobs)


def _artifact_of(tx: Transaction, job_id: str, name: str) -> Artifact:
    artifact = tx.artifacts.get(job_id, name)
    if artifact is None:
        raise NotFound(
            "ARTIFACT_NOT_FOUND",
            f"job {job_id} has no artifact {name!r}",
            details={"artifacts": ",".join(found.name for found in tx.artifacts.list_for_job(job_id))},
        )
    return artifact
