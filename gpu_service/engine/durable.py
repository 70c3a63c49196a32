"""Directories that are there whole or not at all: staged beside their place, fsynced, renamed. Deletes the same way.

Knows nothing of what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_service.engine.pace import NOBODY, Pace, in_one_piece
from gpu_service.journal.failpoints import failpoint

MANIFEST_FILE = "manifest.json"
_STAGING_PREFIX = ".staging-"
_DELETING_PREFIX = ".deleting-"
_DAMAGED_PREFIX = ".damaged-"
# Key of the digest of a manifest's other facts.
_DIGEST = "facts_sha256"
_CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file by content; `path` is relative to its directory, with forward slashes."""

    path: str
    sha256: str
    size_bytes: int


class DamagedDirectory(Exception):
    """A file is missing, or is not the one that the manifest names. `file` is relative to the directory."""

    def __init__(self, file: str, message: str) -> None:
        super().__init__(f"{file}: {message}")
        self.file = file


@contextmanager
def staged(destination: Path, pace: Pace = NOBODY) -> Iterator[Path]:
    """A new directory to write into; on a clean exit every file is fsynced and it becomes `destination`.

    What was at `destination` or left by a process that died is deleted. An exception leaves nothing: half a checkpoint
    on a disk that is full would keep it full. Raises OSError.
    """
    _make_parent(destination.parent)
    staging = destination.parent / f"{_STAGING_PREFIX}{destination.name}"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    try:
        yield staging
        for directory, _, names in os.walk(staging, topdown=False):
            for name in names:
                path = Path(directory) / name
                with in_one_piece(pace, path.stat().st_size):
                    sync(path)
            sync(Path(directory))
        failpoint("staged.before-rename")
        delete(destination)
        staging.rename(destination)
        failpoint("staged.after-rename")
    except BaseException:
        # What went wrong is the news, not what cleaning up met.
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync(destination.parent)


def _make_parent(directory: Path) -> None:
    """Make a directory whose own entry survives a crash too."""
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        sync(directory.parent)


def delete(directory: Path) -> None:
    """Delete a directory so that no half of it is ever taken for the whole. Nothing happens when it is not there."""
    if not directory.exists():
        return
    doomed = directory.parent / f"{_DELETING_PREFIX}{directory.name}"
    if doomed.exists():
        shutil.rmtree(doomed)
    directory.rename(doomed)
    # Else a power loss might leave the name to what is half deleted.
    sync(directory.parent)
    failpoint("deleted.after-rename")
    shutil.rmtree(doomed)


def half_deleted(directory: Path) -> list[Path]:
    """What `delete` had begun with below `directory` when its process died."""
    return sorted(directory.glob(f"{_DELETING_PREFIX}*"))


def sync(path: Path) -> None:
    """Fsync a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_files(directory: Path, pace: Pace = NOBODY) -> list[StoredFile]:
    """Every file below `directory` with its SHA-256, by path; the manifest itself is left out."""
    return [
        describe(path, directory, pace)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST_FILE
    ]


def describe(path: Path, directory: Path, pace: Pace = NOBODY) -> StoredFile:
    """One file below `directory` by content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            pace.note_progress()
    return StoredFile(
        path=path.relative_to(directory).as_posix(), sha256=digest.hexdigest(), size_bytes=path.stat().st_size
    )


def write_manifest(directory: Path, facts: dict[str, Any], files: Sequence[StoredFile]) -> StoredFile:
    """Write `manifest.json` with `facts` and `files` into a staged directory; every other file is complete by now."""
    path = directory / MANIFEST_FILE
    failpoint("checkpoint.before-manifest")
    content = facts | {"files": [asdict(stored) for stored in files]}
    path.write_text(json.dumps(content | {_DIGEST: _digest_of(content)}, indent=1), encoding="utf-8")
    return describe(path, directory)


def _digest_of(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's own facts: files have theirs in it, it has nobody who would have its."""
    facts = {name: fact for name, fact in content.items() if name != _DIGEST}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path, pace: Pace = NOBODY) -> dict[str, Any]:
    """The manifest of a directory after every file in it was compared with its SHA-256. Raises DamagedDirectory."""
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = [_stored_file(**entry) for entry in manifest["files"]]
        # One that was written before manifests had it has none.
        digest = _digest_of(manifest)
        if manifest.get(_DIGEST, digest) != digest:
            raise ValueError(f"its facts have SHA-256 {digest}, not {manifest[_DIGEST]}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedDirectory(MANIFEST_FILE, f"{type(error).__name__}: {error}") from error
    for stored in files:
        try:
            found = describe(directory / stored.path, directory, pace)
        except OSError as error:
            raise DamagedDirectory(stored.path, str(error)) from error
        if found != stored:
            raise DamagedDirectory(stored.path, f"has SHA-256 {found.sha256}, not {stored.sha256}")
    return manifest


def _stored_file(*, path: str, sha256: str, size_bytes: int) -> StoredFile:
    """Raises TypeError, ValueError for values that a manifest cannot have."""
    if not (isinstance(path, str) and isinstance(sha256, str) and isinstance(size_bytes, int)):
        raise TypeError(f"a file's entry is {path!r}, {sha256!r}, {size_bytes!r}")
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{path!r} leaves its directory")
    return StoredFile(path=path, sha256=sha256, size_bytes=size_bytes)


def set_aside(directory: Path) -> Path | None:
    """Take the name of a directory that was found damaged away, so that nobody takes it for whole; where it lies now,
    None when it is not there any more. Raises OSError.
    """
    aside = directory.parent / f"{_DAMAGED_PREFIX}{directory.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        directory.rename(aside)
    except FileNotFoundError:
        return None
    sync(directory.parent)
    return aside
