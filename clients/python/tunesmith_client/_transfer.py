"""Files going up and coming down: hashing, chunks, `.part` files, verification. Makes no call; the facades do.

A download is written to `<name>.part`, continued after a break where it stopped, and renamed only when its size and
SHA-256 are the promised ones. A file name that would leave the destination is refused.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tunesmith.common.v1 import file_pb2
from tunesmith.control.v1 import dataset_service_pb2
from tunesmith_client._config import UPLOAD_BASE_SECONDS
from tunesmith_client._errors import TransferDamaged

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TransferProgress:
    """How far one file is."""

    path: str
    done_bytes: int
    total_bytes: int


ProgressCallback = Callable[[TransferProgress], None]


def ignore_progress(_: TransferProgress) -> None:
    """The callback of those who do not ask."""


def upload_header(path: Path, name: str, format_id: str) -> dataset_service_pb2.UploadDatasetHeader:
    """Reads the file once for its size and SHA-256. Raises OSError when it cannot be read."""
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return dataset_service_pb2.UploadDatasetHeader(
        name=name, size_bytes=size_bytes, sha256=digest.hexdigest(), format=format_id
    )


def upload_seconds(size_bytes: int) -> float:
    """Deadline of an upload."""
    return UPLOAD_BASE_SECONDS + size_bytes / CHUNK_BYTES


def upload_parts(
    path: Path, header: dataset_service_pb2.UploadDatasetHeader, progress: ProgressCallback
) -> Iterator[dataset_service_pb2.UploadDatasetRequest]:
    """The messages of an upload: the header, then the file in chunks."""
    yield dataset_service_pb2.UploadDatasetRequest(header=header)
    done_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield dataset_service_pb2.UploadDatasetRequest(chunk=chunk)
            done_bytes += len(chunk)
            progress(TransferProgress(path=path.name, done_bytes=done_bytes, total_bytes=header.size_bytes))


def destination_of(directory: Path, reference: file_pb2.FileReference) -> Path:
    """Where a file of an artifact goes. Raises TransferDamaged for a name that would leave the directory."""
    relative = PurePosixPath(reference.path)
    if (
        not relative.parts
        or relative.is_absolute()
        or ".." in relative.parts
        or "\\" in reference.path
        or "\0" in reference.path
    ):
        raise TransferDamaged(f"the service names a file outside the destination: {reference.path!r}")
    return directory.joinpath(*relative.parts)


class PartFile:
    """The unfinished file of one download: `open`, `write` chunks, `finish` (verifies and renames), `close`."""

    def __init__(self, target: Path, reference: file_pb2.FileReference, progress: ProgressCallback) -> None:
        self._target = target
        self._part = target.with_name(target.name + ".part")
        self._reference = reference
        self._progress = progress
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self.offset = 0

    def is_there(self) -> bool:
        """Whether the target exists already with the right content."""
        if not self._target.is_file() or self._target.stat().st_size != self._reference.size_bytes:
            return False
        with self._target.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self._reference.sha256

    def open(self) -> None:
        """Opens the part file and hashes what an earlier try left in it; `offset` says how much that is."""
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open("a+b")
        self._file.seek(0)
        while chunk := self._file.read(CHUNK_BYTES):
            self._digest.update(chunk)
            self.offset += len(chunk)
        if self.offset > self._reference.size_bytes:
            self._restart()

    def close(self) -> None:
        """Closes the part file; what came stays for the next try."""
        if self._file is not None:
            self._file.close()

    def write(self, chunk: bytes) -> None:
        """Appends a chunk. Raises TransferDamaged when there is more than was promised."""
        assert self._file is not None, "open the part file first"
        if self.offset + len(chunk) > self._reference.size_bytes:
            self._restart()
            raise TransferDamaged(f"{self._reference.path} is longer than {self._reference.size_bytes} bytes")
        self._file.write(chunk)
        self._digest.update(chunk)
        self.offset += len(chunk)
        total_bytes = self._reference.size_bytes
        self._progress(TransferProgress(path=self._reference.path, done_bytes=self.offset, total_bytes=total_bytes))

    def finish(self) -> Path:
        """Verifies and renames. Raises TransferDamaged, and forgets what came, when size or SHA-256 differ."""
        assert self._file is not None, "open the part file first"
        if self.offset != self._reference.size_bytes or self._digest.hexdigest() != self._reference.sha256:
            self._restart()
            raise TransferDamaged(f"{self._reference.path} came with another size or SHA-256 than promised")
        self._file.close()
        return self._part.replace(self._target)

    def _restart(self) -> None:
        assert self._file is not None, "open the part file first"
        self._file.truncate(0)
        self._digest = hashlib.sha256()
        self.offset = 0
