"""Content-addressed files: `<2 hex>/<sha256>` below one directory, written in `staging/`. Blocking; called in threads.

What is visible is whole and durable: staged, fsynced, renamed, directory fsynced. The directory has one owner.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import BinaryIO, Final

from control_service.adapters.blobs.disk_errors import disk_errors
from control_service.domain.errors import NotFound, ResourceExhausted
from control_service.domain.failpoints import failpoint

_SHA256: Final = re.compile("[0-9a-f]{64}")
_TOKEN: Final = re.compile("[0-9a-f]{32}")
_STAGING: Final = "staging"


class StagingFile:
    """A file that is being written and hashed."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self.token = path.name
        self.size_bytes = 0
        self._path = path
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self._file = path.open("xb")

    def append(self, chunk: bytes) -> None:
        """Adds bytes. TOO_LARGE above the limit, DISK_FULL."""
        if self.size_bytes + len(chunk) > self._max_bytes:
            raise ResourceExhausted(
                "TOO_LARGE", f"more than {self._max_bytes} bytes", details={"max_bytes": str(self._max_bytes)}
            )
        with disk_errors("staged bytes"):
            self._file.write(chunk)
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    def finish(self) -> str:
        """Makes the bytes durable; gives their SHA-256."""
        with disk_errors("staged bytes"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Closes and deletes."""
        # Waits for a write in another thread: buffered files have a lock of their own.
        self._file.close()
        self._path.unlink(missing_ok=True)


class BlobDirectory:
    """One directory of blobs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self) -> None:
        """Makes the directory, and deletes what an earlier process staged and did not finish."""
        with disk_errors("the blob store"):
            shutil.rmtree(self._directory / _STAGING, ignore_errors=True)
            (self._directory / _STAGING).mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where a blob is, or would be."""
        if not _SHA256.fullmatch(sha256):
            raise NotFound("BLOB_NOT_FOUND", "not a lower-case hex SHA-256")
        return self._directory / sha256[:2] / sha256

    def staged_path(self, token: str) -> Path:
        """Where staged bytes are."""
        if not _TOKEN.fullmatch(token):
            raise NotFound("BLOB_NOT_FOUND", "not a token of staged bytes")
        return self._directory / _STAGING / token

    def stage(self, *, max_bytes: int) -> StagingFile:
        """Starts a file."""
        with disk_errors("staged bytes"):
            return StagingFile(self.staged_path(secrets.token_hex(16)), max_bytes=max_bytes)

    def commit(self, token: str, sha256: str) -> None:
        """Makes staged bytes visible and durable under their name; bytes that are there already are kept."""
        source, target = self.staged_path(token), self.path(sha256)
        with disk_errors(f"blob {sha256}"):
            if target.exists():
                source.unlink(missing_ok=True)
                return
            if not target.parent.exists():
                target.parent.mkdir(exist_ok=True)
                _fsync_directory(self._directory)
            # Output trees link to blobs: nobody is to change one in place.
            source.chmod(0o444)
            failpoint("blob.before-rename")
            source.rename(target)
            failpoint("blob.after-rename")
            _fsync_directory(target.parent)

    def discard(self, token: str) -> None:
        """Deletes staged bytes if they are still there."""
        with disk_errors("staged bytes"):
            self.staged_path(token).unlink(missing_ok=True)

    def has(self, sha256: str) -> bool:
        """True when the blob is there."""
        return self.path(sha256).is_file()

    def open_blob(self, sha256: str) -> BinaryIO:
        """A reader. BLOB_NOT_FOUND."""
        with disk_errors(f"blob {sha256}"):
            return self.path(sha256).open("rb")

    def open_staged(self, token: str) -> BinaryIO:
        """A reader of staged bytes."""
        with disk_errors("staged bytes"):
            return self.staged_path(token).open("rb")

    def delete(self, sha256: str) -> int:
        """Deletes a blob; its size, or 0 when it was not there."""
        path = self.path(sha256)
        with disk_errors(f"blob {sha256}"):
            try:
                size_bytes = path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                return 0
            _fsync_directory(path.parent)
            return size_bytes

    def list_all(self) -> list[str]:
        """Names of all blobs; whatever else lies there is not ours to name."""
        with disk_errors("the blob store"):
            return sorted(
                path.name
                for path in self._directory.glob("[0-9a-f][0-9a-f]/*")
                if _SHA256.fullmatch(path.name) and path.parent.name == path.name[:2] and path.is_file()
            )


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
