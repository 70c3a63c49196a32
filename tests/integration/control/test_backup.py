"""Backups of a control service that runs, and what is put back from them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from control_service import main as process
from control_service.data_directory import locked
from tests.fakes.control import Client, control, is_state, is_step
from tests.fakes.gpu_node import FakeGpuNode
from tests.fakes.run_script import NUM_STEPS
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import artifact_service_pb2, dataset_service_pb2


def run(*arguments: object) -> int:
    return process.main([str(argument) for argument in arguments])


async def _finished_job(client: Client, name: str) -> str:
    dataset = await client.upload(name)
    project = await client.create_project(dataset_id=dataset.dataset_id, name=name)
    job_id = str((await client.start_training(project.project_id)).job_id)
    await client.until_event(job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))
    return job_id


async def _adapter(client: Client, job_id: str) -> bytes:
    request = artifact_service_pb2.DownloadArtifactRequest(job_id=job_id, name="adapter", path="adapter_config.json")
    return b"".join([part.chunk async for part in client.artifacts.DownloadArtifact(request)])


async def _log(client: Client, job_id: str) -> list[bytes]:
    return [event.SerializeToString() async for event in client.events(job_id)]


@asynccontextmanager
async def _served(directory: Path, node: FakeGpuNode) -> AsyncIterator[Client]:
    async with control(directory, node) as client:
        await client.until_node_reachable()
        yield client


async def test_a_backup_made_while_it_runs_is_whole(tmp_path: Path, node: FakeGpuNode) -> None:
    data, backup, restored = tmp_path / "control", tmp_path / "backup", tmp_path / "restored"
    async with _served(data, node) as client:
        first = await _finished_job(client, "first")
        assert run("backup", "--data-directory", data, "--to", backup) == 0
        early = {path.name: path.stat().st_mtime_ns for path in backup.rglob("*") if len(path.name) == 64}
        second = await _finished_job(client, "second")
        project = await client.create_project(dataset_id=(await client.upload("third")).dataset_id, name="third")
        assert run("backup", "--data-directory", data, "--to", backup) == 0
        logs = {job_id: await _log(client, job_id) for job_id in (first, second)}
        adapter = await _adapter(client, second)
        await client.upload("not-in-the-backup", b'{"prompt": "late", "completion": "late"}\n')
    # What was there already was not copied again.
    assert early
    assert all((backup / "blobs" / name[:2] / name).stat().st_mtime_ns == early[name] for name in early)
    assert run("restore", "--from", backup, "--data-directory", restored) == 0
    outputs = {path.relative_to(data) for path in (data / "output").rglob("*") if path.is_file()}
    assert outputs == {path.relative_to(restored) for path in (restored / "output").rglob("*") if path.is_file()}
    async with _served(restored, node) as client:
        assert {job_id: await _log(client, job_id) for job_id in (first, second)} == logs
        assert await _adapter(client, second) == adapter
        names = [
            d.name for d in (await client.datasets.ListDatasets(dataset_service_pb2.ListDatasetsRequest())).datasets
        ]
        assert names == ["first", "second", "third"]
        # It goes on where it was: the same installation, the next job.
        job_id = (await client.start_training(project.project_id)).job_id
        await client.until_event(job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))


async def test_what_would_not_be_whole_is_refused(
    tmp_path: Path, node: FakeGpuNode, capsys: pytest.CaptureFixture[str]
) -> None:
    data, backup = tmp_path / "control", tmp_path / "backup"
    async with _served(data, node) as client:
        await _finished_job(client, "first")
        assert run("backup", "--data-directory", data, "--to", backup) == 0
    with locked(tmp_path / "served"):
        assert run("restore", "--from", backup, "--data-directory", tmp_path / "served") == 3
    assert run("restore", "--from", backup, "--data-directory", data) == 1
    assert "nothing is overwritten" in capsys.readouterr().err
    others = tmp_path / "others"
    others.mkdir()
    (others / "letter.txt").write_text("dear")
    assert run("backup", "--data-directory", data, "--to", others) == 1
    assert run("backup", "--data-directory", others, "--to", tmp_path / "new") == 1
    assert not (tmp_path / "new").exists()

    restored = tmp_path / "restored"
    (blob, *_) = [path for path in backup.rglob("*") if len(path.name) == 64]
    content = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run("restore", "--from", backup, "--data-directory", restored) == 1
    assert "is damaged" in capsys.readouterr().err
    assert not (restored / "control.sqlite").exists()
    blob.unlink()
    assert run("restore", "--from", backup, "--data-directory", restored) == 1
    assert "is missing" in capsys.readouterr().err
    (backup / "backup.json").write_text(json.dumps({"version": 1, "finished": False}))
    assert run("restore", "--from", backup, "--data-directory", restored) == 1
    assert "was not finished" in capsys.readouterr().err
    # The same directory, made whole again.
    assert run("backup", "--data-directory", data, "--to", backup) == 0
    assert run("restore", "--from", backup, "--data-directory", restored) == 0


async def test_a_backup_that_cannot_be_made_leaves_what_was_there(
    tmp_path: Path, node: FakeGpuNode, capsys: pytest.CaptureFixture[str]
) -> None:
    data, backup, fresh = tmp_path / "control", tmp_path / "backup", tmp_path / "fresh"
    async with _served(data, node) as client:
        await _finished_job(client, "first")
        assert run("backup", "--data-directory", data, "--to", backup) == 0
        later = {"prompt": "later", "completion": "later"}
        added = await client.upload("later", (json.dumps(later) + "\n").encode())
    blob = data / "blobs" / added.sha256[:2] / added.sha256
    blob.chmod(0o644)
    blob.write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()}
    for target in (backup, fresh):
        assert run("backup", "--data-directory", data, "--to", target) == 1
        assert "is damaged" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()} == before
    assert list(fresh.iterdir()) == []
    # What another version made is not ours to delete.
    (backup / "backup.json").write_text(json.dumps({"version": 99, "finished": True}))
    assert run("backup", "--data-directory", data, "--to", backup) == 1
    assert (backup / "control.sqlite").exists()


async def test_a_job_that_was_live_goes_on_from_the_backup(tmp_path: Path, node: FakeGpuNode) -> None:
    data, backup, restored = tmp_path / "control", tmp_path / "backup", tmp_path / "restored"
    node.hold_at_step = 2
    async with _served(data, node) as client:
        dataset = await client.upload("rows")
        project = await client.create_project(dataset_id=dataset.dataset_id)
        job_id = (await client.start_training(project.project_id)).job_id
        before = await client.until_event(job_id, is_step(1))
        assert run("backup", "--data-directory", data, "--to", backup) == 0
        await client.until_event(job_id, is_step(2))
    assert run("restore", "--from", backup, "--data-directory", restored) == 0
    await node.release()
    async with _served(restored, node) as client:
        events = await client.until_event(job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert events[: len(before)] == before
        steps = [event.payload.step.step for event in events if event.kind == event_pb2.EVENT_KIND_STEP]
        assert steps == list(range(1, NUM_STEPS + 1))
        assert len(node.started) == 1
