"""What a writer says is durable is: each file fsynced before its rename, each directory after it, in this order.

A removed fsync changes nothing that a process can see, so the calls themselves are watched.
"""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from control_service import backup
from control_service.adapters.blobs.disk import BlobDirectory
from control_service.adapters.blobs.output import OutputTree
from control_service.domain.artifact import FileReference
from gpu_service.engine import durable
from gpu_service.journal import Writer, events
from gpu_service.planner.staging import is_there, stage_directory
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.node_files import NodeFiles, RunKey
from gpu_service.shim import durable_json
from tests.fakes.disk_steps import record_disk_steps
from tunesmith.common.v1 import event_pb2

CONTENT = b"content" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def put(blobs: BlobDirectory) -> None:
    file = blobs.stage(max_bytes=10**6)
    file.append(CONTENT)
    blobs.commit(file.token, file.finish())


def test_a_blob_of_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = BlobDirectory(tmp_path)
    blobs.open()
    disk = record_disk_steps(monkeypatch)
    put(blobs)
    assert ("rename", blobs.path(SHA256)) in disk.steps
    assert disk.is_durable, (disk.unsynced, disk.unsettled)
    blobs.delete(SHA256)
    assert disk.steps[-1] == ("fsync", blobs.path(SHA256).parent)


@pytest.mark.parametrize("links", [True, False])
def test_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    blobs = BlobDirectory(tmp_path / "blobs")
    blobs.open()
    outputs = OutputTree(root=tmp_path / "output", blobs=blobs, **({} if links else {"link": refuse}))
    outputs.open()
    disk = record_disk_steps(monkeypatch)
    put(blobs)
    file = FileReference(path="a/b.bin", sha256=SHA256, size_bytes=len(CONTENT))
    outputs.materialize("out/adapter", [file])
    assert ("rename", tmp_path / "output/out/adapter") in disk.steps
    assert disk.is_durable, (disk.unsynced, disk.unsettled)
    before = len(disk.steps)
    outputs.remove("out/adapter")
    assert ("fsync", tmp_path / "output/out") in disk.steps[before:]


def test_the_summary_of_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = record_disk_steps(monkeypatch)
    backup._write_durably(tmp_path / "backup.json", "{}")
    assert disk.is_durable, (disk.unsynced, disk.unsettled)


def test_a_small_file_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = record_disk_steps(monkeypatch)
    durable_json.write(tmp_path / "node.json", {"name": "n"})
    assert ("rename", tmp_path / "node.json") in disk.steps
    assert disk.is_durable, (disk.unsynced, disk.unsettled)


def test_an_accepted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = NodeFiles(tmp_path / "node", tmp_path / "models")
    files.prepare()
    disk = record_disk_steps(monkeypatch)
    files.write_run(RunKey(installation_id="i", job_id="j", attempt=1), {"job_id": "j"})
    assert disk.is_durable, (disk.unsynced, disk.unsettled)


async def test_a_blob_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield CONTENT[:100]
        yield CONTENT[100:]

    (tmp_path / "partial").mkdir()
    store = BlobStore(tmp_path)
    disk = record_disk_steps(monkeypatch)
    await store.write(sha256=SHA256, size_bytes=len(CONTENT), offset=0, chunks=chunks())
    assert ("rename", store.path(SHA256)) in disk.steps
    assert disk.is_durable, (disk.unsynced, disk.unsettled)


def test_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = record_disk_steps(monkeypatch)
    with durable.staged(tmp_path / "checkpoints" / "step-1") as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "weights").write_bytes(CONTENT)
        durable.write_manifest(staging, {"step": 1}, durable.list_files(staging))
    assert ("rename", tmp_path / "checkpoints/step-1") in disk.steps
    assert disk.is_durable, (disk.unsynced, disk.unsettled)


def test_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = record_disk_steps(monkeypatch)
    with stage_directory(tmp_path / "plan", is_whole=lambda directory: True) as staged:
        (staged / "data.json").write_bytes(CONTENT)
    assert ("rename", tmp_path / "plan") in disk.steps
    assert disk.is_durable, (disk.unsynced, disk.unsettled)


def test_a_plan_that_another_planner_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have died between the rename and its sync."""
    (tmp_path / "plan").mkdir()
    disk = record_disk_steps(monkeypatch)
    assert is_there(tmp_path / "plan", is_whole=lambda directory: True)
    assert disk.steps == [("fsync", tmp_path)]


class Pauses(threading.Event):
    """How long a thread meant to wait for it, each time."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        return super().wait(timeout)


def test_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outcome is on the disk when append returns, a step within the interval, all of it at the close."""
    path = tmp_path / "journal"
    disk = record_disk_steps(monkeypatch)
    pauses = Pauses()
    with Writer.open(path, 1) as writer:
        monkeypatch.setattr(writer, "_closed", pauses)
        assert ("fsync", tmp_path) in disk.steps
        for state in (event_pb2.RUN_STATE_RUNNING, event_pb2.RUN_STATE_SUCCEEDED):
            writer.append(events.wrap(event_pb2.RunStateEvent(state=state)))
            assert disk.has(path)
        writer.append(events.wrap(event_pb2.StepEvent(step=1, total_steps=2)))
        deadline = time.monotonic() + 30
        while not (disk.has(path) and pauses.seconds):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # How long it took says nothing on a busy machine.
        assert set(pauses.seconds) == {0.2}
        monkeypatch.setattr("gpu_service.journal.file._SYNC_INTERVAL_SECONDS", 3600.0)
        writer.append(events.wrap(event_pb2.StepEvent(step=2, total_steps=2)))
    assert disk.has(path)


def test_a_cut_tail_is_on_the_disk_before_anything_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    with Writer.open(path, 1) as writer:
        writer.append(events.wrap(event_pb2.StepEvent(step=1, total_steps=2)))
    with path.open("ab") as file:
        file.write(b"torn")
    disk = record_disk_steps(monkeypatch)
    with Writer.open(path, 1):
        assert disk.has(path)
