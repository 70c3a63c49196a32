"""Copies a control service's data while it runs, and puts such a copy back. Serves nothing and changes no original.

A backup is a directory: `control.sqlite` (by SQLite's backup interface, one consistent snapshot), `blobs/` with every
content that the snapshot names, and `backup.json`, which says whether it is finished. Blobs never change, so a backup
into the directory of an earlier one copies only what is new. One that cannot be made, for want of room or else, takes
away what it had written: an earlier backup is as it was, and a new directory is left empty.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from control_service.adapters.blobs.directories import make_directories
from control_service.adapters.blobs.disk import BlobDirectory
from control_service.adapters.blobs.output import OutputTree
from control_service.adapters.sql.engine import sqlite_module
from control_service.adapters.sql.store import DATABASE_NAME
from control_service.data_directory import locked
from control_service.domain.artifact import FileReference
from control_service.domain.errors import TunesmithError
from control_service.domain.failpoints import failpoint

_SUMMARY: Final = "backup.json"
# Of a backup that is being made; renamed at its end.
_STAGED: Final = f".{DATABASE_NAME}"
_FINISHED: Final = ".finished.json"
_VERSION: Final = 1
_UNFINISHED: Final = json.dumps({"version": _VERSION, "finished": False}) + "\n"
# A dataset or artifact that is deleted while it is being copied makes the snapshot stale; the next one is without it.
_MAX_SNAPSHOTS: Final = 10
_COPY_BYTES: Final = 1 << 20
# Every content that a record names, as in `DatasetRepository.content_is_used`.
_NAMED: Final = "SELECT sha256 FROM datasets UNION SELECT sha256 FROM blob_references ORDER BY 1"


class BackupError(Exception):
    """The backup cannot be made or put back; the text says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class BackupSummary:
    """What `backup.json` says."""

    installation_id: str
    # UTC, ISO 8601.
    create_time: str
    num_blobs: int
    # Of database and blobs.
    size_bytes: int


def make_backup(*, data_directory: Path, target: Path) -> BackupSummary:
    """Makes or renews the backup in `target`; the service may run. BackupError, TunesmithError DISK_FULL; OSError when
    a disk refuses at the very end."""
    database = data_directory / DATABASE_NAME
    if not database.is_file():
        raise BackupError(f"{data_directory} holds no {DATABASE_NAME}: it is no control service's data directory")
    make_directories(target)
    if any(target.iterdir()) and not (target / _SUMMARY).exists():
        raise BackupError(f"{target} is not empty and has no {_SUMMARY}: nothing is written among other files")
    blobs = BlobDirectory(target / "blobs")
    try:
        summary, named = _stage(database, BlobDirectory(data_directory / "blobs"), target, blobs)
    except sqlite_module().Error as error:
        _take_away(target)
        raise BackupError(f"the database cannot be copied to {target}: {error}") from error
    except OSError as error:
        _take_away(target)
        raise BackupError(f"{target} cannot be written: {error}") from error
    except (BackupError, TunesmithError):
        _take_away(target)
        raise
    # From here to the end the directory is no backup, and says so. Nothing that follows needs room.
    _write_durably(target / _SUMMARY, _UNFINISHED)
    failpoint("backup.before-rename")
    (target / _STAGED).rename(target / DATABASE_NAME)
    # Before the summary says that it is finished.
    _fsync(target)
    failpoint("backup.after-rename")
    for sha256 in set(blobs.list_all()).difference(named):
        blobs.delete(sha256)
    (target / _FINISHED).rename(target / _SUMMARY)
    _fsync(target)
    return summary


def _stage(
    database: Path, source: BlobDirectory, target: Path, blobs: BlobDirectory
) -> tuple[BackupSummary, Sequence[str]]:
    """Everything that needs room: snapshot, blobs and summary, beside what an earlier backup has."""
    if not (target / _SUMMARY).exists():
        _write_durably(target / _SUMMARY, _UNFINISHED)
    blobs.open()
    staged = target / _STAGED
    for _ in range(_MAX_SNAPSHOTS):
        _snapshot(database, staged)
        named = _named(staged)
        if all(_copy_blob(source, blobs, sha256) for sha256 in named):
            break
    else:
        raise BackupError(f"data was deleted faster than it could be copied, {_MAX_SNAPSHOTS} times; try again later")
    summary = BackupSummary(
        installation_id=_installation_id(staged),
        create_time=datetime.now(UTC).isoformat(timespec="seconds"),
        num_blobs=len(named),
        size_bytes=staged.stat().st_size + sum(blobs.path(s).stat().st_size for s in named),
    )
    finished = {"version": _VERSION, "finished": True, **vars(summary)}
    (target / _FINISHED).write_text(json.dumps(finished, indent=2) + "\n")
    _fsync(target / _FINISHED)
    return summary, named


def _take_away(target: Path) -> None:
    """Deletes what a backup that could not be made has written, and nothing of a finished one."""
    # A disk that refuses this, too, has a summary that says unfinished.
    with suppress(OSError):
        for name in (_STAGED, f"{_STAGED}-journal", f"{_STAGED}-wal", f"{_STAGED}-shm", _FINISHED, f".{_SUMMARY}"):
            (target / name).unlink(missing_ok=True)
        if _is_unfinished(target):
            (target / DATABASE_NAME).unlink(missing_ok=True)
            shutil.rmtree(target / "blobs", ignore_errors=True)
            # Last: among other files nothing would be written again.
            (target / _SUMMARY).unlink(missing_ok=True)
        elif (target / DATABASE_NAME).exists():
            blobs = BlobDirectory(target / "blobs")
            blobs.open()
            for sha256 in set(blobs.list_all()).difference(_named(target / DATABASE_NAME)):
                blobs.delete(sha256)


def _is_unfinished(target: Path) -> bool:
    """Its summary says so; one that cannot be read says nothing."""
    try:
        value = json.loads((target / _SUMMARY).read_text())
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(value, dict) and value.get("finished") is False


def restore_backup(*, source: Path, data_directory: Path, output_root: Path) -> BackupSummary:
    """Puts a backup into a data directory that has none yet: every blob verified, outputs made anew.

    BackupError: `source` is no finished backup or is damaged, or the data directory is not empty of one. Taken: a
    service runs there.
    """
    summary = _read_summary(source)
    with locked(data_directory):
        if (data_directory / DATABASE_NAME).exists():
            raise BackupError(f"{data_directory} has a database; move it away first, nothing is overwritten")
        _check_integrity(source / DATABASE_NAME)
        blobs, copies = BlobDirectory(data_directory / "blobs"), BlobDirectory(source / "blobs")
        blobs.open()
        for sha256 in _named(source / DATABASE_NAME):
            if not _copy_blob(copies, blobs, sha256):
                raise BackupError(f"blob {sha256} is missing in {source}")
        outputs = OutputTree(root=output_root, blobs=blobs)
        outputs.open()
        for path, files in _artifacts(source / DATABASE_NAME):
            outputs.materialize(path, files)
        # Last: a directory with a database is whole.
        staged = data_directory / f".{DATABASE_NAME}"
        shutil.copyfile(source / DATABASE_NAME, staged)
        _fsync(staged)
        staged.rename(data_directory / DATABASE_NAME)
        _fsync(data_directory)
    return summary


def _copy_blob(source: BlobDirectory, target: BlobDirectory, sha256: str) -> bool:
    """Copies and verifies one blob, unless it is there; False when the source has it no more."""
    if target.has(sha256):
        return True
    try:
        reader = source.path(sha256).open("rb")
    except FileNotFoundError:
        return False
    with reader:
        file = target.stage(max_bytes=os.fstat(reader.fileno()).st_size)
        try:
            while chunk := reader.read(_COPY_BYTES):
                file.append(chunk)
            found = file.finish()
        except BaseException:
            file.abandon()
            raise
    if found != sha256:
        target.discard(file.token)
        raise BackupError(f"blob {sha256} is damaged: its bytes have SHA-256 {found}")
    target.commit(file.token, sha256)
    return True


# The database, by the interpreter's or pysqlite3's own interface: SQLAlchemy has none for backups.


@contextmanager
def _connected(database: Path, *, read_only: bool = True) -> Iterator[Any]:
    mode = "ro" if read_only else "rwc"
    with closing(sqlite_module().connect(f"file:{database}?mode={mode}", uri=True, timeout=30.0)) as connection:
        yield connection


def _snapshot(database: Path, staged: Path) -> None:
    staged.unlink(missing_ok=True)
    # In one step: in several, a service that commits all the time would make it begin again and again.
    with _connected(database) as source, _connected(staged, read_only=False) as copy:
        source.backup(copy, pages=-1)
        # One file, without a -wal beside it.
        copy.execute("PRAGMA journal_mode = DELETE")
    _fsync(staged)


def _check_integrity(database: Path) -> None:
    with _connected(database) as connection:
        (found,) = connection.execute("PRAGMA integrity_check").fetchone()
    if found != "ok":
        raise BackupError(f"{database} is damaged: {found}")


def _named(database: Path) -> list[str]:
    with _connected(database) as connection:
        return [sha256 for (sha256,) in connection.execute(_NAMED)]


def _installation_id(database: Path) -> str:
    with _connected(database) as connection:
        (value,) = connection.execute("SELECT value FROM meta WHERE key = 'installation_id'").fetchone()
    return str(value)


def _artifacts(database: Path) -> list[tuple[str, list[FileReference]]]:
    with _connected(database) as connection:
        rows = connection.execute("SELECT path, files FROM artifacts").fetchall()
    return [(path, [FileReference(**file) for file in json.loads(files)]) for path, files in rows]


def _read_summary(source: Path) -> BackupSummary:
    try:
        value = json.loads((source / _SUMMARY).read_text())
        version = value.pop("version")
        if version != _VERSION:
            raise BackupError(f"{source} is a backup of version {version}; this program reads version {_VERSION}")
        if not value.pop("finished"):
            raise BackupError(f"{source} was not finished; make the backup again")
        return BackupSummary(**value)
    except FileNotFoundError as error:
        raise BackupError(f"{source} has no {_SUMMARY}: it is no backup") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupError(f"{source / _SUMMARY} cannot be read: {error}") from error


def _write_durably(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}")
    staged.write_text(text)
    _fsync(staged)
    staged.rename(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
