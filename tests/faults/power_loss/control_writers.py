"""What control writes beside its database, as writers whose every moment the power may go: blobs, outputs, backups.

A record in the database is played by an acknowledgment: SQLite's commit is trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from control_service.adapters.blobs.disk import BlobDirectory
from control_service.adapters.blobs.output import OutputTree
from control_service.adapters.sql import schema
from control_service.adapters.sql.engine import make_engine
from control_service.backup import BackupError, make_backup, restore_backup
from control_service.data_directory import locked
from control_service.domain.artifact import FileReference
from tests.faults.power_loss.harness import Acknowledged, Writer

_CONTENTS = (b"first " * 30, b"second " * 30, b"third")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _put(blobs: BlobDirectory, data: bytes) -> None:
    file = blobs.stage(max_bytes=len(data))
    for start in range(0, len(data), 64):
        file.append(data[start : start + 64])
    blobs.commit(file.token, file.finish())


def _store_blobs(root: Path, acknowledge: Acknowledged) -> None:
    with locked(root / "control"):
        blobs = BlobDirectory(root / "control" / "blobs")
        blobs.open()
        # The same content comes twice: what is there already is as safe as what was just written.
        for data in (*_CONTENTS, _CONTENTS[0]):
            _put(blobs, data)
            acknowledge(_digest(data))


def _blob_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    blobs = BlobDirectory(root / "control" / "blobs")
    blobs.open()
    for data in _CONTENTS:
        digest = _digest(data)
        if not blobs.has(digest):
            if digest in acknowledged:
                yield f"blob {digest[:8]} was acknowledged and is gone"
        elif blobs.path(digest).read_bytes() != data:
            yield f"blob {digest[:8]} is there and not whole"
        _put(blobs, data)
        if blobs.path(digest).read_bytes() != data:
            yield f"blob {digest[:8]} was stored again and is not whole"


_FILES = tuple(
    FileReference(path=path, sha256=_digest(data), size_bytes=len(data))
    for path, data in zip(("a.bin", "nested/b.bin", "nested/c.bin"), _CONTENTS, strict=True)
)


def _stored(root: Path) -> BlobDirectory:
    blobs = BlobDirectory(root / "control" / "blobs")
    blobs.open()
    for data in _CONTENTS:
        _put(blobs, data)
    return blobs


def _prepare_outputs(root: Path) -> None:
    (root / "control").mkdir()
    _stored(root)


def _materialize(root: Path, acknowledge: Acknowledged) -> None:
    outputs = OutputTree(root=root / "output", blobs=BlobDirectory(root / "control" / "blobs"))
    outputs.open()
    for job in ("one", "two"):
        # Played as the record: once it is there, the output is not made again.
        recorded = root / "control" / f"{job}.recorded"
        if not recorded.exists():
            outputs.materialize(f"some/where/{job}/adapter", _FILES)
            recorded.touch()
        acknowledge(job)


def _output_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    outputs = OutputTree(root=root / "output", blobs=BlobDirectory(root / "control" / "blobs"))
    outputs.open()
    for job in ("one", "two"):
        directory = root / "output" / "some" / "where" / job / "adapter"
        if directory.exists() or job in acknowledged:
            for file, data in zip(_FILES, _CONTENTS, strict=True):
                path = directory / file.path
                if not path.is_file() or path.read_bytes() != data:
                    yield f"{file.path} of job {job} is not whole"
        # The collector does it again after a crash.
        outputs.materialize(f"some/where/{job}/adapter", _FILES)


def _prepare_database(root: Path) -> None:
    (root / "control").mkdir()
    _stored(root)
    engine = make_engine(root / "control" / "control.sqlite")
    schema.metadata.create_all(engine)
    with engine.connect() as connection:
        connection.execute(sa.insert(schema.meta).values(key="installation_id", value="f" * 32))
        for number, data in enumerate(_CONTENTS):
            connection.exec_driver_sql(
                "INSERT INTO datasets (name, sha256, size_bytes, num_examples, format, create_time)"
                " VALUES (?, ?, ?, 1, 'x', 0)",
                (f"d{number}", _digest(data), len(data)),
            )
    engine.dispose()


def _back_up(root: Path, acknowledge: Acknowledged) -> None:
    make_backup(data_directory=root / "control", target=root / "backups" / "one")
    acknowledge("made")


def _backup_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    restored = root / "restored"
    try:
        restore_backup(source=root / "backups" / "one", data_directory=restored, output_root=root / "restored-output")
    except BackupError as error:
        if acknowledged:
            yield f"the backup was made and cannot be put back: {error}"
        return
    yield from _restored_problems(restored)


def _restored_problems(restored: Path) -> Iterator[str]:
    blobs = BlobDirectory(restored / "blobs")
    for data in _CONTENTS:
        if not blobs.has(_digest(data)) or blobs.path(_digest(data)).read_bytes() != data:
            yield "a blob of what was restored is not whole"


def _prepare_backup(root: Path) -> None:
    _prepare_database(root)
    make_backup(data_directory=root / "control", target=root / "backup")


def _restore(root: Path, acknowledge: Acknowledged) -> None:
    restore_backup(source=root / "backup", data_directory=root / "new" / "control", output_root=root / "new" / "output")
    acknowledge("restored")


def _restore_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    restored = root / "new" / "control"
    if (restored / "control.sqlite").exists():
        yield from _restored_problems(restored)
    elif acknowledged:
        yield "what was restored is gone"
    else:
        restore_backup(source=root / "backup", data_directory=restored, output_root=root / "new" / "output")


CONTROL_WRITERS: tuple[Writer, ...] = (
    Writer(name="control-blobs", promise="R1", act=_store_blobs, problems=_blob_problems),
    Writer(name="outputs", promise="R19", act=_materialize, problems=_output_problems, prepare=_prepare_outputs),
    Writer(
        name="backup",
        promise="R1",
        act=_back_up,
        problems=_backup_problems,
        prepare=_prepare_database,
        can_be_killed=False,
    ),
    Writer(
        name="restore",
        promise="R1",
        act=_restore,
        problems=_restore_problems,
        prepare=_prepare_backup,
        can_be_killed=False,
    ),
)
