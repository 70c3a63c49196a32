"""Use cases of datasets: take in, read, list, preview, delete."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass

from control_service.app.idempotency import RequestKey
from control_service.app.ports import BlobStore, Clock, ImportRoot
from control_service.app.store_ports import Store
from control_service.domain.dataset import Dataset, DatasetRow


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
    """Takes a file in, reads every row, registers it. InvalidArgument CHECKSUM_MISMATCH, DATASET_MALFORMED (lines
    as violations), DATASET_EMPTY, DATASET_FORMAT_UNKNOWN; AlreadyExists DATASET_NAME_TAKEN; ResourceExhausted
    TOO_LARGE."""
    raise NotImplementedError


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
    raise NotImplementedError


async def get_dataset(dataset_id: int, *, store: Store) -> Dataset:
    """Reads one dataset's record. NotFound DATASET_NOT_FOUND."""
    raise NotImplementedError


async def list_datasets(
    *, store: Store, after_id: int = 0, limit: int = 50, name_contains: str = ""
) -> Sequence[Dataset]:
    """Datasets by id after an id; at most `limit`."""
    raise NotImplementedError


async def preview_dataset(dataset_id: int, *, num_rows: int, store: Store, blobs: BlobStore) -> Sequence[DatasetRow]:
    """The first rows as they are in the file. NotFound DATASET_NOT_FOUND."""
    raise NotImplementedError


async def delete_dataset(
    dataset_id: int, *, store: Store, blobs: BlobStore, clock: Clock, request: RequestKey | None = None
) -> None:
    """Deletes a dataset that no project names and no live job uses. FailedPrecondition DATASET_IN_USE; NotFound
    DATASET_NOT_FOUND."""
    raise NotImplementedError
