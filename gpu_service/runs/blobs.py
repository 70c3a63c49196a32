"""The node's store of bytes by content. A blob is visible only when its size and SHA-256 are right.

An unfinished write is kept and can be continued; a newer writer of the same blob takes over from an older one, so
that a half-dead connection never blocks an upload. Refuses names: content is the only address.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Iterable
from io import FileIO
from pathlib import Path

from gpu_service.domain.errors import Fault, Refusal, refuse_user
from gpu_service.journal.failpoints import failpoint
from gpu_service.runs.node_files import check_sha256
from gpu_service.runs.threads import finish_in_thread
from gpu_service.shim.durable_json import sync_directory

MAX_CHUNK_BYTES = 1024 * 1024


class BlobStore:
    """Blobs below one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._partial = directory / "partial"
        # Number of the newest writer of each blob that is being written.
        self._newest_writer: dict[str, int] = {}

    def path(self, sha256: str) -> Path:
        """Where the blob lies, or would. Raises `Refusal` INVALID_FIELD for what is no digest."""
        return self._directory / check_sha256(sha256)[:2] / sha256

    async def find_missing(self, digests: Iterable[str]) -> list[tuple[str, int]]:
        """Those that are not here, each with the bytes of an unfinished write. Raises `Refusal` INVALID_FIELD."""
        wanted = [check_sha256(digest) for digest in digests]
        return await asyncio.to_thread(
            lambda: [(digest, self._stored_bytes(digest)) for digest in wanted if not self._note_use(digest)]
        )

    def _note_use(self, sha256: str) -> bool:
        """Whether the blob is here; whoever asks is about to need it, so it is the last to be deleted for room."""
        try:
            os.utime(self.path(sha256))
        except FileNotFoundError:
            return False
        return True

    def _stored_bytes(self, sha256: str) -> int:
        try:
            return (self._partial / sha256).stat().st_size
        except FileNotFoundError:
            return 0

    async def write(self, *, sha256: str, size_bytes: int, offset: int, chunks: AsyncIterator[bytes]) -> int:
        """Write a blob from an offset on; gives its size. Nothing is read when it is here already.

        Raises `Refusal`: OFFSET_MISMATCH (details `stored_bytes`), CHECKSUM_MISMATCH, TOO_LARGE, DISK_FULL.
        """
        path = self.path(sha256)
        if await asyncio.to_thread(path.exists):
            return size_bytes
        number = self._newest_writer[sha256] = self._newest_writer.get(sha256, 0) + 1
        try:
            # A file object, because it is closed even when the caller goes away while it is being opened.
            with await asyncio.to_thread(self._open, sha256, size_bytes, offset) as partial:
                end = offset
                async for chunk in chunks:
                    self._check_writer(sha256, number, end)
                    self._check_chunk(chunk, end, size_bytes)
                    await finish_in_thread(_write_whole, partial.fileno(), chunk, end)
                    end += len(chunk)
            self._check_writer(sha256, number, end)
            await finish_in_thread(self._commit, sha256, size_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(str(error)) from error
            raise
        finally:
            if self._newest_writer.get(sha256) == number:
                del self._newest_writer[sha256]
        return size_bytes

    def _check_writer(self, sha256: str, number: int, end: int) -> None:
        """The bytes are the newest writer's: to go on with, and to judge."""
        if self._newest_writer.get(sha256) != number:
            raise _offset_mismatch(sha256, end, "another call writes this blob now")

    def _open(self, sha256: str, size_bytes: int, offset: int) -> FileIO:
        self._partial.mkdir(parents=True, exist_ok=True)
        stored = self._stored_bytes(sha256)
        # From the start again is always allowed: the caller may not trust what is here.
        if offset not in (0, stored):
            raise _offset_mismatch(sha256, stored, f"the write starts at {offset}, but {stored} bytes are stored")
        if size_bytes - offset > shutil.disk_usage(self._directory).free:
            raise _disk_full(f"{size_bytes - offset} bytes do not fit the disk")
        descriptor = os.open(self._partial / sha256, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        partial = FileIO(descriptor, "w")
        partial.truncate(offset)
        return partial

    @staticmethod
    def _check_chunk(chunk: bytes, end: int, size_bytes: int) -> None:
        if len(chunk) > MAX_CHUNK_BYTES:
            raise refuse_user("TOO_LARGE", f"a chunk has {len(chunk)} bytes; {MAX_CHUNK_BYTES} are allowed")
        if end + len(chunk) > size_bytes:
            raise refuse_user("CHECKSUM_MISMATCH", f"more than the declared {size_bytes} bytes came")

    def _commit(self, sha256: str, size_bytes: int) -> None:
        partial = self._partial / sha256
        with partial.open("rb") as stream:
            stored = os.fstat(stream.fileno()).st_size
            if stored < size_bytes:
                raise refuse_user(
                    "CHECKSUM_MISMATCH",
                    f"the stream ended at {stored} of {size_bytes} bytes; go on from there",
                    stored_bytes=stored,
                )
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != sha256:
                partial.unlink()
                raise refuse_user("CHECKSUM_MISMATCH", f"the bytes have SHA-256 {found}, not {sha256}")
            os.fsync(stream.fileno())
        path = self.path(sha256)
        path.parent.mkdir(exist_ok=True)
        failpoint("node-blob.before-rename")
        partial.rename(path)
        failpoint("node-blob.after-rename")
        sync_directory(path.parent)


def _write_whole(descriptor: int, chunk: bytes, offset: int) -> None:
    written = 0
    while written < len(chunk):
        written += os.pwrite(descriptor, chunk[written:], offset + written)


def _offset_mismatch(sha256: str, stored: int, message: str) -> Refusal:
    details = {"sha256": sha256, "stored_bytes": str(stored)}
    return Refusal("OFFSET_MISMATCH", Fault.PLATFORM, message, field="offset", details=details)


def _disk_full(message: str) -> Refusal:
    return Refusal("DISK_FULL", Fault.PLATFORM, message)
