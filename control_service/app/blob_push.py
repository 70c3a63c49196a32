"""Gives a node the blobs that it lacks, going on where an unfinished write stopped. Sends nothing that is there."""

from __future__ import annotations

from collections.abc import Sequence

from control_service.app.ports import BlobStore, NodeClient
from control_service.domain.artifact import FileReference
from control_service.domain.spec import TrainingSpec
from control_service.domain.start_from import start_files


def blobs_of_spec(spec: TrainingSpec) -> list[FileReference]:
    """The files that a spec needs on a node."""
    datasets = [FileReference(path="", sha256=d.sha256, size_bytes=d.size_bytes) for d in spec.datasets]
    return [*datasets, *start_files(spec)]


async def push_missing_blobs(client: NodeClient, blobs: BlobStore, files: Sequence[FileReference]) -> None:
    """Pushes those of the files that the node lacks. NotFound BLOB_NOT_FOUND when control lacks one, too."""
    sizes = {file.sha256: file.size_bytes for file in files}
    if not sizes:
        return
    missing = await client.find_missing_blobs(sorted(sizes))
    for sha256, stored_bytes in missing.items():
        await client.write_blob(
            sha256=sha256,
            size_bytes=sizes[sha256],
            offset=stored_bytes,
            chunks=blobs.read(sha256, offset=stored_bytes),
        )
