"""What a job starts from besides its base: the weights that an earlier job left, as part of its spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from control_service.domain.artifact import FileReference
from control_service.domain.spec import TrainingSpec


def start_from(earlier: TrainingSpec, *, job_id: str, name: str, files: Sequence[FileReference]) -> Mapping[str, Any]:
    """`StartFrom` as proto JSON with proto field names; `earlier` is the spec of the job that left the files."""
    value: dict[str, Any] = {
        "job_id": job_id,
        "name": name,
        "files": [
            {"path": file.path, "sha256": file.sha256, "size_bytes": str(file.size_bytes)}
            for file in sorted(files, key=lambda file: file.path)
        ],
        "training_type": earlier.training_type,
    }
    if lora := earlier.hyperparameters.get("lora"):
        value["lora"] = dict(lora)
    return value


def start_files(spec: TrainingSpec) -> tuple[FileReference, ...]:
    """The files that a spec starts from; none when it starts from its base."""
    return tuple(
        FileReference(path=file["path"], sha256=file["sha256"], size_bytes=int(file.get("size_bytes", 0)))
        for file in spec.start_from.get("files", ())
    )
