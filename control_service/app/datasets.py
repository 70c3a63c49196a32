"""Use cases of datasets: take in, read, list, delete. What is in their rows is `dataset_inspection`'s to show."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from control_service.app.content import free_unnamed, naming
from control_service.app.dataset_intake import DatasetLimits, Intake, ReadTurns, take_in
from control_service.app.idempotency import RequestKey, once
from control_service.app.lookups import dataset_of
from control_service.app.ports import (
    BlobStore,
    Clock,
    DatasetFiles,
    ImportRoot,
    StagedBlob,
)
from control_service.app.store_ports import Store, Transaction
from control_service.app.tasks import undisturbed
from control_service.domain.dataset import Dataset
from control_service.domain.dataset_rows import check_format
from control_service.domain.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    ResourceExhausted,
    TunesmithError,
)


@dataclass(frozen=True, kw_only=True)
class UploadHeader:
    """What is being uploaded. `format` of its rows; empty: found from the first. `sha256` lower-case hex."""

    name: str
    sha256: str
    size_bytes: int
    format: str = ""


async def upload_dataset(
    header: UploadHeader,
    chunks: AsyncIterable[bytes],
    *,
    store: Store,
    blobs: BlobStore,
    files: DatasetFiles,
    clock: Clock,
    limits: DatasetLimits,
    turns: ReadTurns,
) -> Dataset:
    """Takes a file in, reads every row, registers it; the same name with the same file again is the same dataset.
    InvalidArgument CHECKSUM_MISMATCH, DATASET_MALFORMED (bad rows as violations), DATASET_EMPTY,
    DATASET_FORMAT_UNKNOWN; AlreadyExists DATASET_NAME_TAKEN; ResourceExhausted TOO_LARGE, DISK_FULL."""
    check_format(header.format)
    if header.size_bytes > limits.max_dataset_bytes:
        # Said before a byte is taken in.
        raise ResourceExhausted(
            "TOO_LARGE",
            f"{header.size_bytes} bytes; at most {limits.max_dataset_bytes} are taken",
            details={"max_bytes": str(limits.max_dataset_bytes)},
        )
    staged = await blobs.stage(chunks, max_bytes=limits.max_dataset_bytes)
    try:
        if staged.sha256 != header.sha256 or (header.size_bytes and staged.size_bytes != header.size_bytes):
            raise InvalidArgument(
                "CHECKSUM_MISMATCH",
                f"{staged.size_bytes} bytes with SHA-256 {staged.sha256} arrived; the header says otherwise",
                details={"sha256": staged.sha256, "size_bytes": str(staged.size_bytes)},
                violations=(FieldViolation("header.sha256", "is not that of the bytes that arrived"),),
            )
        return await _register(
            header.name,
            header.format,
            staged,
            store=store,
            blobs=blobs,
            files=files,
            clock=clock,
            limits=limits,
            turns=turns,
        )
    finally:
        await blobs.discard(staged)


async def register_dataset(
    name: str,
    path: str,
    *,
    format: str = "",
    store: Store,
    blobs: BlobStore,
    imports: ImportRoot,
    files: DatasetFiles,
    clock: Clock,
    limits: DatasetLimits,
    turns: ReadTurns,
) -> Dataset:
    """Registers a file below the import root. Fails as `upload_dataset` and `ImportRoot.read` do."""
    check_format(format)
    staged = await blobs.stage(imports.read(path), max_bytes=limits.max_dataset_bytes)
    try:
        return await _register(
            name, format, staged, store=store, blobs=blobs, files=files, clock=clock, limits=limits, turns=turns
        )
    finally:
        await blobs.discard(staged)


async def _register(
    name: str,
    format: str,
    staged: StagedBlob,
    *,
    store: Store,
    blobs: BlobStore,
    files: DatasetFiles,
    clock: Clock,
    limits: DatasetLimits,
    turns: ReadTurns,
) -> Dataset:
    earlier = await store.read(lambda tx: _same_dataset(tx, name, format, staged.sha256))
    if earlier is not None:
        return earlier
    intake = await take_in(staged, format=format, blobs=blobs, files=files, limits=limits, turns=turns)
    # A caller who goes away now would leave bytes that no record names, or a record of which nobody knows.
    return await undisturbed(_store(name, format, intake, store=store, blobs=blobs, now=clock.utc_now()))


async def _store(name: str, format: str, intake: Intake, *, store: Store, blobs: BlobStore, now: datetime) -> Dataset:
    def work(tx: Transaction) -> Dataset:
        return _same_dataset(tx, name, format, intake.draft.file_sha256) or tx.datasets.insert(
            name=name, draft=intake.draft, now=now
        )

    try:
        # The bytes are durable before a record names them; a crash between the two leaves an unnamed blob, never a lie.
        async with naming(blobs):
            await blobs.commit(intake.stored)
            return await store.transact(work)
    except TunesmithError:
        await free_unnamed((intake.stored.sha256,), store=store, blobs=blobs)
        raise
    finally:
        await blobs.discard(intake.stored)


def _same_dataset(tx: Transaction, name: str, format: str, file_sha256: str) -> Dataset | None:
    """The dataset of this name, if it is the same; AlreadyExists DATASET_NAME_TAKEN if it is another."""
    dataset = tx.datasets.get_by_name(name)
    if dataset is None:
        return None
    if dataset.file_sha256 == file_sha256 and format in ("", dataset.format):
        return dataset
    raise AlreadyExists(
        "DATASET_NAME_TAKEN",
        f"dataset {dataset.dataset_id} has the name {name!r} and other content",
        details={"dataset_id": str(dataset.dataset_id)},
    )


async def get_dataset(dataset_id: int, *, store: Store) -> Dataset:
    """Reads one dataset's record. NotFound DATASET_NOT_FOUND."""
    return await store.read(lambda tx: dataset_of(tx, dataset_id))


async def list_datasets(
    *, store: Store, after_id: int = 0, limit: int = 50, name_contains: str = ""
) -> Sequence[Dataset]:
    """Datasets by id after an id; at most `limit`."""
    return await store.read(
        lambda tx: tx.datasets.list_page(after_id=after_id, limit=limit, name_contains=name_contains)
    )


async def delete_dataset(
    dataset_id: int, *, store: Store, blobs: BlobStore, clock: Clock, request: RequestKey | None = None
) -> None:
    """Deletes a dataset that no project names and no live job uses. FailedPrecondition DATASET_IN_USE; NotFound
    DATASET_NOT_FOUND."""
    now = clock.utc_now()

    def work(tx: Transaction) -> Sequence[str]:
        """The content that lost a holder."""

        def delete() -> tuple[str, Sequence[str]]:
            dataset = dataset_of(tx, dataset_id)
            _refuse_if_used(tx, dataset_id)
            tx.datasets.delete(dataset_id)
            return "", (dataset.sha256,)

        return once(tx, request, now, work=delete, replay=lambda _: ())

    await free_unnamed(await store.transact(work), store=store, blobs=blobs)


def _refuse_if_used(tx: Transaction, dataset_id: int) -> None:
    projects = tx.projects.names_of_users_of_dataset(dataset_id)
    jobs = tx.jobs.live_job_ids_of_dataset(dataset_id)
    if projects or jobs:
        users = ", ".join([*(f"project {name!r}" for name in projects), *(f"job {job_id}" for job_id in jobs)])
        raise FailedPrecondition(
            "DATASET_IN_USE", f"dataset {dataset_id} is used by {users}", details={"used_by": users}
        )
