"""Copies files from a node into control's store, each verified by its own SHA-256 and size. Keeps what is there."""

from __future__ import annotations

from collections.abc import Sequence

from control_service.app.ports import BlobStore, NodeClient
from control_service.domain.artifact import FileReference
from control_service.domain.errors import FailedPrecondition
from control_service.domain.failpoints import failpoint


async def fetch_files(client: NodeClient, blobs: BlobStore, files: Sequence[FileReference]) -> None:
    """Copies the files. FailedPrecondition CHECKSUM_MISMATCH; NotFound BLOB_NOT_FOUND; Unavailable when the node is
    silent; ResourceExhausted DISK_FULL."""
    for file in files:
        if not await blobs.has(file.sha256):
            await _fetch(client, blobs, file)


async def _fetch(client: NodeClient, blobs: BlobStore, file: FileReference) -> None:
    staged = await blobs.stage(client.read_blob(file.sha256), max_bytes=file.size_bytes)
    try:
        if staged.sha256 != file.sha256 or staged.size_bytes != file.size_bytes:
            raise FailedPrecondition(
                "CHECKSUM_MISMATCH",
                f"{file.path}: {staged.size_bytes} bytes with SHA-256 {staged.sha256} came from the node",
                details={"file": file.path, "sha256": staged.sha256},
            )
        failpoint("fetch.before-commit")
        await blobs.commit(staged)
        failpoint("fetch.after-commit")
    finally:
        await blobs.discard(staged)
