"""What the node does when its disk is full: refuses with numbers, writes what must be written, closes runs later."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gpu_service.domain.errors import Refusal
from gpu_service.runs import launcher
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.engine_directories import NO_ENDING
from gpu_service.runs.node_files import NodeFiles
from gpu_service.runs.room import full_disk_is_a_refusal
from gpu_service.shim import durable_json
from gpu_service.shim.closing import close_run
from gpu_service.shim.records import ExitRecord, ShimRecord
from tests.fakes.gpu_runs import payloads, write_run
from tests.unit.gpu_server.test_admission import Node, gpu
from tunesmith.common.v1 import errors_pb2

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def _free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, num_bytes))


async def test_a_node_without_room_for_what_a_run_leaves_refuses_it_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path, [gpu(0)])
    _free(monkeypatch, 1000)
    with pytest.raises(Refusal) as caught:
        await node.admit()
    assert caught.value.reason == "DISK_FULL"
    assert caught.value.details["free_bytes"] == "1000"
    assert int(caught.value.details["needed_bytes"]) > 2 * 1024**2
    # Nothing is held for a run that was refused.
    assert node.ledger.holder_of("cuda:0") is None
    _free(monkeypatch, 1 << 40)
    await node.admit()


async def test_a_plan_warns_of_a_disk_that_its_saves_will_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(tmp_path, [gpu(0)])
    planning = node.admission._planning
    _free(monkeypatch, 1 << 40)
    plain = await planning.checked(node.spec, gpu(0))
    assert not any("disk" in warning for warning in plain["warnings"])
    _free(monkeypatch, 1000)
    warned = await planning.checked(node.spec, gpu(0))
    (warning,) = [warning for warning in warned["warnings"] if "disk" in warning]
    assert "1000 are free" in warning
    assert {**warned, "warnings": []} == {**plain, "warnings": []}


def test_only_a_full_disk_is_said_to_be_one() -> None:
    with pytest.raises(Refusal, match="the run's files"), full_disk_is_a_refusal("the run's files"):
        raise FULL
    with pytest.raises(PermissionError), full_disk_is_a_refusal("the run's files"):
        raise PermissionError(errno.EACCES, "no")


async def test_half_a_blob_does_not_keep_a_full_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"a" * 100
        yield b"b" * 100

    pwrite = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset:
            raise FULL
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Refusal, match="DISK_FULL"):
        await store.write(sha256="a" * 64, size_bytes=200, offset=0, chunks=chunks())
    assert list((tmp_path / "partial").iterdir()) == []


def _replace_finds_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> Path:
        raise FULL

    monkeypatch.setattr(Path, "replace", full)


def test_a_shims_record_changes_on_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = ShimRecord(
        shim_pid=1, shim_start_time=2, engine_pid=3, engine_start_time=4, run_directory=None, stop_mode=None
    )
    record.write(tmp_path)
    size = (tmp_path / "shim.json").stat().st_size
    _replace_finds_no_room(monkeypatch)
    busy = ShimRecord(
        shim_pid=1, shim_start_time=2, engine_pid=3, engine_start_time=4, run_directory="/runs/a/1", stop_mode="cancel"
    )
    busy.write(tmp_path)
    assert ShimRecord.read(tmp_path) == busy
    # No block more than before, and no half file beside it.
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("shim.json", size)]


def test_what_cannot_be_replaced_leaves_no_half_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable_json.write(tmp_path / "node.json", {"a": 1})
    _replace_finds_no_room(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        durable_json.write(tmp_path / "node.json", {"a": 2})
    assert durable_json.read(tmp_path / "node.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["node.json"]


def test_an_engine_that_found_no_room_is_named(tmp_path: Path) -> None:
    directory = write_run(tmp_path)
    ending = ExitRecord(status=None, signal=None, phase="", run_directory=None, stop_mode=None, disk_full=True)
    close_run(directory, ending)
    assert payloads(directory)[-1].run_state.failure.reason == errors_pb2.ERROR_REASON_DISK_FULL


async def test_a_run_without_engine_is_closed_as_soon_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_SWEEP_SECONDS", 0.01)
    tries: list[ExitRecord] = []
    closed = asyncio.Event()

    def close(directory: Path, ending: ExitRecord) -> None:
        tries.append(ending)
        if len(tries) < 3:
            raise FULL

    monkeypatch.setattr(launcher, "close_run", close)

    class Closed:
        directory = tmp_path
        stop_mode = "cancel"

        async def refresh(self) -> None:
            closed.set()

    made: Any = launcher.Launcher.__new__(launcher.Launcher)
    monkeypatch.setattr(made, "_left", lambda run: None, raising=False)
    await made._close_without_engine(Closed(), NO_ENDING)
    assert closed.is_set()
    assert [ending.stop_mode for ending in tries] == ["cancel"] * 3


def test_what_an_adopted_engine_may_read_stays(tmp_path: Path) -> None:
    files = NodeFiles(tmp_path / "node", tmp_path / "models")
    files.prepare()
    lock = files.engines / "e" / "shim.lock"
    lock.parent.mkdir()
    for name in ("generate-1", "probe-1"):
        (files.requests / name).mkdir()
        (files.requests / name / "request.json").touch()
    (files.requests / "plan.json").touch()
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        files.prepare()
        assert [path.name for path in files.requests.iterdir()] == ["generate-1"]
        assert (files.requests / "generate-1/request.json").exists()
    finally:
        os.close(descriptor)
    files.prepare()
    assert list(files.requests.iterdir()) == []
