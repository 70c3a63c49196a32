"""Control's blob store in memory, with the output tree as a dict."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import BinaryIO

from control_service.app.ports import BlobWriter, StagedBlob
from control_service.domain.artifact import FileReference
from control_service.domain.errors import NotFound, ResourceExhausted

_CHUNK = 1024**2


class MemoryWriter:
    """Implements `BlobWriter`."""

    def __init__(self, blobs: MemoryBlobStore, *, max_bytes: int) -> None:
        self._blobs = blobs
        self._max_bytes = max_bytes
        self._data = bytearray()

    def append(self, chunk: bytes) -> None:
        self._data += chunk
        if len(self._data) > self._max_bytes:
            raise ResourceExhausted("TOO_LARGE", f"more than {self._max_bytes} bytes")

    def finish(self) -> StagedBlob:
        return self._blobs.keep(bytes(self._data))

    def close(self) -> None:
        self._data.clear()


class MemoryBlobStore:
    """Implements `BlobStore`. `outputs`: path -> {file path: bytes}."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.staged: dict[str, bytes] = {}
        self.outputs: dict[str, dict[str, bytes]] = {}
        self.is_full = False
        # True: no output can be deleted.
        self.is_broken = False
        self._tokens = itertools.count()

    def add(self, data: bytes, path: str = "file") -> FileReference:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return FileReference(path=path, sha256=sha256, size_bytes=len(data))

    async def stage(self, chunks: AsyncIterable[bytes], *, max_bytes: int) -> StagedBlob:
        data = bytearray()
        async for chunk in chunks:
            data += chunk
            if len(data) > max_bytes:
                raise ResourceExhausted("TOO_LARGE", f"more than {max_bytes} bytes")
        if self.is_full:
            raise ResourceExhausted("DISK_FULL", "no space is left")
        return self.keep(bytes(data))

    def keep(self, data: bytes) -> StagedBlob:
        token = str(next(self._tokens))
        self.staged[token] = data
        return StagedBlob(token=token, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    def open_writer(self, *, max_bytes: int) -> BlobWriter:
        return MemoryWriter(self, max_bytes=max_bytes)

    def open_staged(self, staged: StagedBlob) -> BinaryIO:
        return io.BytesIO(self.staged[staged.token])

    async def commit(self, staged: StagedBlob) -> None:
        self.blobs[staged.sha256] = self.staged.pop(staged.token)

    async def discard(self, staged: StagedBlob) -> None:
        self.staged.pop(staged.token, None)

    async def has(self, sha256: str) -> bool:
        return sha256 in self.blobs

    def open_blob(self, sha256: str) -> BinaryIO:
        return io.BytesIO(self._get(sha256))

    async def read(self, sha256: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        data = self._get(sha256)[offset:]
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]

    async def delete(self, sha256: str) -> int:
        return len(self.blobs.pop(sha256, b""))

    async def list_all(self) -> Sequence[str]:
        return sorted(self.blobs)

    async def materialize(self, *, path: str, files: Sequence[FileReference]) -> None:
        self.outputs[path] = {file.path: self._get(file.sha256) for file in files}

    async def remove_output(self, *, path: str) -> None:
        if self.is_broken:
            raise ResourceExhausted("DISK_FULL", "the disk does not answer")
        self.outputs = {
            name: files for name, files in self.outputs.items() if name != path and not name.startswith(f"{path}/")
        }

    def _get(self, sha256: str) -> bytes:
        if sha256 not in self.blobs:
            raise NotFound("BLOB_NOT_FOUND", sha256)
        return self.blobs[sha256]
