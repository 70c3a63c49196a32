"""Implements `app.ports.BlobStore` over the disk. Every blocking call is made on threads of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from control_service.adapters.blobs.disk import BlobDirectory, StagingFile
from control_service.adapters.blobs.output import OutputTree
from control_service.app.ports import BlobWriter, StagedBlob
from control_service.domain.artifact import FileReference

CHUNK_BYTES: Final = 1024**2
_NUM_THREADS: Final = 8

T = TypeVar("T")


class _StagingWriter:
    """Implements `app.ports.BlobWriter`."""

    def __init__(self, file: StagingFile) -> None:
        self._file = file
        self._is_finished = False

    def append(self, chunk: bytes) -> None:
        """Adds bytes."""
        self._file.append(chunk)

    def finish(self) -> StagedBlob:
        """Makes the bytes durable and gives them away."""
        sha256 = self._file.finish()
        self._is_finished = True
        return StagedBlob(token=self._file.token, sha256=sha256, size_bytes=self._file.size_bytes)

    def close(self) -> None:
        """Forgets bytes that were not given away."""
        if not self._is_finished:
            self._file.abandon()


class DiskBlobStore:
    """Blobs in one directory, outputs below one root. `open` before use, `close` after."""

    def __init__(self, *, directory: Path, output_root: Path) -> None:
        self._blobs = BlobDirectory(directory)
        self._outputs = OutputTree(root=output_root, blobs=self._blobs)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="blobs")

    async def open(self) -> None:
        """Makes the directories and deletes what an earlier process left half written."""
        await self._in_thread(self._blobs.open)
        await self._in_thread(self._outputs.open)

    async def close(self) -> None:
        """Waits for what is under way on disk."""
        await asyncio.to_thread(self._threads.shutdown)

    async def stage(self, chunks: AsyncIterable[bytes], *, max_bytes: int) -> StagedBlob:
        """Takes bytes in and hashes them; forgets them when the sender fails."""
        making = self._threads.submit(lambda: self._blobs.stage(max_bytes=max_bytes))
        try:
            file = await asyncio.wrap_future(making)
        except asyncio.CancelledError:
            # The thread makes, or has made, the file all the same.
            making.add_done_callback(self._abandon_made)
            raise
        is_whole = False
        try:
            async for chunk in chunks:
                await self._in_thread(lambda chunk=chunk: file.append(chunk))  # type: ignore[misc]
            sha256 = await self._in_thread(file.finish)
            is_whole = True
        finally:
            if not is_whole:
                # Not awaited: this may be the end of a cancelled call.
                self._threads.submit(file.abandon)
        return StagedBlob(token=file.token, sha256=sha256, size_bytes=file.size_bytes)

    def _abandon_made(self, making: Future[StagingFile]) -> None:
        if not making.cancelled() and making.exception() is None:
            self._threads.submit(making.result().abandon)

    def open_writer(self, *, max_bytes: int) -> BlobWriter:
        """Starts staging bytes that a thread makes."""
        return _StagingWriter(self._blobs.stage(max_bytes=max_bytes))

    def open_staged(self, staged: StagedBlob) -> BinaryIO:
        """A blocking reader of staged bytes."""
        return self._blobs.open_staged(staged.token)

    async def commit(self, staged: StagedBlob) -> None:
        """Makes staged bytes durable and visible under their SHA-256."""
        await self._in_thread(lambda: self._blobs.commit(staged.token, staged.sha256))

    async def discard(self, staged: StagedBlob) -> None:
        """Forgets staged bytes."""
        await self._in_thread(lambda: self._blobs.discard(staged.token))

    async def has(self, sha256: str) -> bool:
        """True when the blob is there, whole."""
        return await self._in_thread(lambda: self._blobs.has(sha256))

    def open_blob(self, sha256: str) -> BinaryIO:
        """A blocking reader of a blob."""
        return self._blobs.open_blob(sha256)

    async def read(self, sha256: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        """A blob from an offset in chunks of at most 1 MiB."""
        file = await self._in_thread(lambda: self._blobs.open_blob(sha256))
        try:
            await self._in_thread(lambda: file.seek(offset))
            while chunk := await self._in_thread(lambda: file.read(CHUNK_BYTES)):
                yield chunk
        finally:
            self._threads.submit(file.close)

    async def delete(self, sha256: str) -> int:
        """Deletes a blob; its bytes, 0 when it was not there."""
        return await self._in_thread(lambda: self._blobs.delete(sha256))

    async def list_all(self) -> Sequence[str]:
        """SHA-256 of every blob that is there."""
        return await self._in_thread(self._blobs.list_all)

    async def materialize(self, *, path: str, files: Sequence[FileReference]) -> None:
        """Makes `<output root>/<path>/` hold exactly these files."""
        await self._in_thread(lambda: self._outputs.materialize(path, files))

    async def remove_output(self, *, path: str) -> None:
        """Deletes `<output root>/<path>/` and directories that this leaves empty."""
        await self._in_thread(lambda: self._outputs.remove(path))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
