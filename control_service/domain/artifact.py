"""What jobs leave: artifacts and checkpoints, as records of files by content. Holds no bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FileReference:
    """A file by content: relative path with forward slashes, lower-case hex SHA-256, size."""

    path: str
    sha256: str
    size_bytes: int


class ArtifactKind(StrEnum):
    """What an artifact is."""

    ADAPTER = "ADAPTER"
    MODEL = "MODEL"
    REPORT = "REPORT"
    CHECKPOINT = "CHECKPOINT"
    MERGED = "MERGED"


class CheckpointStatus(StrEnum):
    """Where the bytes of a checkpoint are."""

    COMMITTED = "COMMITTED"
    REPLICATED = "REPLICATED"
    DELETED = "DELETED"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A collected artifact. `path` is relative, below the output root."""

    job_id: str
    name: str
    kind: ArtifactKind
    files: tuple[FileReference, ...]
    path: str
    create_time: datetime

    @property
    def size_bytes(self) -> int:
        """Sum over the files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A point that training can go on from. `files` may be read from the node, or, REPLICATED, from control's store.

    Losses are in nats per target token; None where none was told. `best`: no earlier one had a held-out loss as low.
    """

    job_id: str
    attempt: int
    name: str
    step: int
    status: CheckpointStatus
    size_bytes: int
    manifest_sha256: str
    files: tuple[FileReference, ...]
    node: str
    create_time: datetime
    probe_loss: float | None = None
    held_out_loss: float | None = None
    best: bool = False


def files_to_json(files: Iterable[FileReference]) -> list[dict[str, Any]]:
    """File references as plain JSON, as the database keeps them."""
    return [{"path": file.path, "sha256": file.sha256, "size_bytes": file.size_bytes} for file in files]


def files_from_json(value: Iterable[Mapping[str, Any]]) -> tuple[FileReference, ...]:
    """Reads what `files_to_json` wrote."""
    return tuple(FileReference(**item) for item in value)
