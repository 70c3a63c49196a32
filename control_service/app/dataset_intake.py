"""Turns an uploaded file into stored JSON lines: reads and checks every row in a thread that a cancelled call stops.

Reads no more files at once than it may; the next ones wait in the order in which they came. Leaves no bytes behind that
its caller does not get. Registers nothing.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any, BinaryIO, Final, cast

from control_service.app.ports import BlobStore, DatasetFiles, StagedBlob
from control_service.app.tasks import undisturbed
from control_service.domain.dataset import DatasetDraft
from control_service.domain.dataset_files import JSON_LINES, FileLimits, OpenedFile, SourceRow
from control_service.domain.dataset_rows import RowSummary, read_rows

_PIECE_BYTES: Final = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class DatasetLimits:
    """How much is taken in."""

    max_dataset_bytes: int = 16 * 1024**3
    files: FileLimits = field(default_factory=FileLimits)

    def stored_bytes(self, file_size_bytes: int) -> int:
        """What the rows of a file of this size may come to as JSON lines: tables may repeat a value for nothing."""
        return min(self.max_dataset_bytes, self.files.decompressed_bytes(file_size_bytes))


class ReadTurns:
    """Places for files that are read at the same time: each takes memory for finding duplicates, a thread, and, for
    Parquet, a process."""

    def __init__(self, *, max_reads: int) -> None:
        self._free = asyncio.Semaphore(max_reads)

    async def take(self) -> None:
        """Waits for a place, in the order of asking. Cancelling it takes none, and gives none back."""
        await self._free.acquire()

    def give_back(self) -> None:
        """Lets the next one read."""
        self._free.release()


@dataclass(frozen=True, kw_only=True)
class Intake:
    """What a valid file became. `stored` is the upload itself when that is plain JSON lines."""

    draft: DatasetDraft
    stored: StagedBlob


async def take_in(
    staged: StagedBlob,
    *,
    format: str,
    blobs: BlobStore,
    files: DatasetFiles,
    limits: DatasetLimits,
    turns: ReadTurns,
) -> Intake:
    """Reads every row once it is this file's turn; the caller commits or discards what it is given. InvalidArgument
    DATASET_MALFORMED, DATASET_EMPTY, DATASET_FORMAT_UNKNOWN; ResourceExhausted TOO_LARGE, DISK_FULL."""
    await turns.take()
    unwanted = Event()
    reading = asyncio.ensure_future(
        asyncio.to_thread(_read, staged, format=format, blobs=blobs, files=files, limits=limits, unwanted=unwanted)
    )
    # When the thread is over, not when its caller is: a thread that nobody waits for still takes what it takes.
    reading.add_done_callback(lambda _: turns.give_back())
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        # The thread ends at its next row, or piece of the file; a process that reads for it is ended.
        unwanted.set()
        await undisturbed(_forget(reading, blobs))
        raise


async def _forget(reading: asyncio.Future[Intake], blobs: BlobStore) -> None:
    """The thread may just have finished: then nobody else will forget its bytes."""
    await asyncio.wait([reading])
    if reading.exception() is None:
        await blobs.discard(reading.result().stored)


class _Unwanted(Exception):
    """The call was cancelled; nobody waits for what this thread does."""


class _WhileWanted(io.RawIOBase):
    """A file that ends with `_Unwanted`: gigabytes of it may hold no row, such as blank lines."""

    def __init__(self, stream: BinaryIO, unwanted: Event) -> None:
        self._stream = stream
        self._unwanted = unwanted

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As of the file."""
        return self._stream.seek(offset, whence)

    def fileno(self) -> int:
        """As of the file, for a process that reads it."""
        return self._stream.fileno()

    def readinto(self, buffer: Any, /) -> int:
        """As of the file."""
        if self._unwanted.is_set():
            raise _Unwanted
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _read(
    staged: StagedBlob, *, format: str, blobs: BlobStore, files: DatasetFiles, limits: DatasetLimits, unwanted: Event
) -> Intake:
    with (
        blobs.open_staged(staged) as stream,
        io.BufferedReader(_WhileWanted(stream, unwanted), _PIECE_BYTES) as wanted,
        files.open(cast("BinaryIO", wanted), size_bytes=staged.size_bytes, unwanted=unwanted) as opened,
    ):
        file = replace(opened, rows=_while_wanted(opened.rows, unwanted))
        if file.file_format == JSON_LINES and not file.compression:
            return _intake(staged, staged, file, read_rows(file, format=format, limits=limits.files))
        writer = blobs.open_writer(max_bytes=limits.stored_bytes(staged.size_bytes))
        try:
            summary = read_rows(file, format=format, limits=limits.files, store=writer.append)
            stored = writer.finish()
        finally:
            writer.close()
        return _intake(staged, stored, file, summary)


def _while_wanted(rows: Iterator[SourceRow], unwanted: Event) -> Iterator[SourceRow]:
    for row in rows:
        if unwanted.is_set():
            raise _Unwanted
        yield row


def _intake(uploaded: StagedBlob, stored: StagedBlob, file: OpenedFile, summary: RowSummary) -> Intake:
    return Intake(
        stored=stored,
        draft=DatasetDraft(
            sha256=stored.sha256,
            size_bytes=stored.size_bytes,
            num_examples=summary.num_examples,
            format=summary.format,
            file_format=file.file_format,
            compression=file.compression,
            file_sha256=uploaded.sha256,
            file_size_bytes=uploaded.size_bytes,
            statistics=summary.statistics,
        ),
    )
