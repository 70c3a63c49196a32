"""Use cases of datasets: take in, read, list, preview, delete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass

from control_service.app.content import free_unnamed, naming
from control_service.app.idempotency import RequestKey, once
from control_service.app.lookups import dataset_of
from control_service.app.ports import BlobStore, Clock, ImportRoot, StagedBlob
from control_service.app.store_ports import Store, Transaction
from control_service.domain.dataset import Dataset, DatasetRow
from control_service.domain.dataset_rows import RowSummary, preview_rows, read_dataset
from control_service.domain.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    ResourceExhausted,
)


@dataclass(frozen=True, kw_only=True)
class DatasetLimits:
    """How much is taken in."""

    max_dataset_bytes: int = 16 * 1024**3


@dataclass(frozen=True, kw_only=True)
class UploadHeader:
    """What is being uploaded. `format` empty: found from the first row. `sha256` lower-case hex."""

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
    clock: Clock,
    limits: DatasetLimits,
) -> Dataset:
    """Takes a file in, reads every row, registers it. InvalidArgument CHECKSUM_MISMATCH, DATASET_MALFORMED (lines as
    violations), DATASET_EMPTY, DATASET_FORMAT_UNKNOWN; AlreadyExists DATASET_NAME_TAKEN; ResourceExhausted
    TOO_LARGE."""
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
        return await _register(header.name, header.format, staged, store=store, blobs=blobs, clock=clock)
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
    clock: Clock,
    limits: DatasetLimits,
) -> Dataset:
    """Registers a file below the import root. Fails as `upload_dataset` and `ImportRoot.read` do."""
    staged = await blobs.stage(imports.read(path), max_bytes=limits.max_dataset_bytes)
    try:
        return await _register(name, format, staged, store=store, blobs=blobs, clock=clock)
    finally:
        await blobs.discard(staged)


async def _register(
    name: str, format: str, staged: StagedBlob, *, store: Store, blobs: BlobStore, clock: Clock
) -> Dataset:
    earlier = await store.read(lambda tx: _same_dataset(tx, name, format, staged.sha256))
    if earlier is not None:
        return earlier
    summary = await asyncio.to_thread(_read_staged, blobs, staged, format)
    now = clock.utc_now()

    def work(tx: Transaction) -> Dataset:
        return _same_dataset(tx, name, format, staged.sha256) or tx.datasets.insert(
            name=name,
            sha256=staged.sha256,
            size_bytes=staged.size_bytes,
            num_examples=summary.num_examples,
            format=summary.format,
            now=now,
        )

    # The bytes are durable before a record names them; a crash between the two leaves an unnamed blob, never a lie.
    async with naming(blobs):
        await blobs.commit(staged)
        return await store.transact(work)


def _same_dataset(tx: Transaction, name: str, format: str, sha256: str) -> Dataset | None:
    """The dataset of this name, if it is the same; AlreadyExists DATASET_NAME_TAKEN if it is another."""
    dataset = tx.datasets.get_by_name(name)
    if dataset is None:
        return None
    if dataset.sha256 == sha256 and format in ("", dataset.format):
        return dataset
    raise AlreadyExists(
        "DATASET_NAME_TAKEN",
        f"dataset {dataset.dataset_id} has the name {name!r} and other content",
        details={"dataset_id": str(dataset.dataset_id)},
    )


def _read_staged(blobs: BlobStore, staged: StagedBlob, format: str) -> RowSummary:
    with blobs.open_staged(staged) as stream:
        return read_dataset(stream, format=format)


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


async def preview_dataset(dataset_id: int, *, num_rows: int, store: Store, blobs: BlobStore) -> Sequence[DatasetRow]:
    """The first rows as they are in the file. NotFound DATASET_NOT_FOUND."""
    dataset = await get_dataset(dataset_id, store=store)

    def preview() -> Sequence[DatasetRow]:
        with blobs.open_blob(dataset.sha256) as stream:
            return preview_rows(stream, num_rows=num_rows)

    return await asyncio.to_thread(preview)


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
