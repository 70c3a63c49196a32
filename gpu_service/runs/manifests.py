"""The manifests of what runs left: reads them, whatever a disk made of them, and sets a damaged checkpoint aside.

Refuses to hash anything: what a file's bytes are is compared where they are read.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from gpu_service.domain.trainer import trainer_of
from gpu_service.shim import durable_json

MANIFEST = "manifest.json"
# What has a hidden name is no checkpoint: it is being staged or deleted, or was found damaged.
_DAMAGED_PREFIX = ".damaged-"
# What a disk says of bytes that it lost; any other error says nothing of the file.
_UNREADABLE = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
_log = structlog.get_logger(__name__)
_Kind = TypeVar("_Kind")


class DamagedManifest(Exception):
    """The file is there and is no manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileReference:
    """A file by content; `path` is relative with forward slashes."""

    path: str
    sha256: str
    size_bytes: int


def read(path: Path) -> bytes:
    """The bytes of a manifest. Raises FileNotFoundError, DamagedManifest where the disk has none for us, OSError."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        raise DamagedManifest(f"{MANIFEST}: {error.strerror}") from error


def parse_checkpoint(raw: bytes) -> Sequence[FileReference]:
    """The files of a checkpoint, without the manifest itself. Raises DamagedManifest."""
    return _files(_parse(raw))


def parse_trainer(raw: bytes) -> str:
    """What trained the steps of a checkpoint. Raises DamagedManifest."""
    document = _parse(raw)
    if not isinstance(document, dict):
        raise DamagedManifest(f"{MANIFEST} is no object")
    return trainer_of(document)


def parse_artifacts(raw: bytes) -> Sequence[tuple[str, Sequence[FileReference]]]:
    """Name and files of every artifact. Raises DamagedManifest."""
    artifacts = _list(_parse(raw), "artifacts")
    return [(_text(artifact, "name"), _files(artifact)) for artifact in artifacts]


def set_aside(checkpoint: Path, problem: str) -> None:
    """Take a damaged checkpoint's name away, so that nobody goes on from it or copies it; its bytes stay for whoever
    looks into it, until the run is released. Raises OSError.
    """
    aside = checkpoint.with_name(f"{_DAMAGED_PREFIX}{checkpoint.name}")
    _log.error("checkpoint-damaged", checkpoint=checkpoint.name, problem=problem, set_aside=str(aside))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        checkpoint.rename(aside)
    except FileNotFoundError:
        # Another call found it, or its run was released.
        return
    durable_json.sync_directory(checkpoint.parent)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedManifest(f"{MANIFEST} is not JSON: {error}") from error


def _files(document: Any) -> list[FileReference]:
    return [
        FileReference(path=_text(file, "path"), sha256=_text(file, "sha256"), size_bytes=_number(file, "size_bytes"))
        for file in _list(document, "files")
    ]


def _list(document: Any, key: str) -> list[Any]:
    return _value(document, key, list)


def _text(document: Any, key: str) -> str:
    return _value(document, key, str)


def _number(document: Any, key: str) -> int:
    return _value(document, key, int)


def _value(document: Any, key: str, kind: type[_Kind]) -> _Kind:
    found = document.get(key) if isinstance(document, dict) else None
    if not isinstance(found, kind):
        raise DamagedManifest(f"{MANIFEST} has no {key!r} of type {kind.__name__} where it must")
    return found
