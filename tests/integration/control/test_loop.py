"""The event loop waits for no disk: while calls of every kind are served, its own thread touches no file of control's.

Told by audit events rather than by time, so that a loaded machine changes nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.control import Client, control, is_state
from tests.fakes.gpu_node import FakeGpuNode
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import artifact_service_pb2, dataset_service_pb2, job_service_pb2

_TOUCHES = frozenset(
    {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.listdir", "os.scandir", "os.chmod"}
    | {"shutil.rmtree", "sqlite3.connect", "time.sleep"}
)
_watched: dict[str, Any] = {"thread": 0, "root": "", "seen": []}


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _TOUCHES or threading.get_ident() != _watched["thread"]:
        return
    named = [str(argument) for argument in arguments if isinstance(argument, str | Path)]
    if event == "time.sleep" or any(name.startswith(_watched["root"]) or "/" not in name for name in named[:1]):
        _watched["seen"].append((event, *named))


@contextmanager
def _disk_touches(root: Path) -> Iterator[list[Any]]:
    """What this thread does to files below `root`, or by names relative to an open directory. Hooks stay for ever, so
    there is one that listens only here."""
    if "hook" not in _watched:
        _watched["hook"] = True
        sys.addaudithook(_hear)
    _watched.update(thread=threading.get_ident(), root=str(root), seen=[])
    try:
        yield _watched["seen"]
    finally:
        _watched["thread"] = 0


async def _serve_every_kind_of_call(client: Client) -> None:
    dataset = await client.upload("rows")
    await client.datasets.PreviewDataset(dataset_service_pb2.PreviewDatasetRequest(dataset_id=dataset.dataset_id))
    project = await client.create_project(dataset_id=dataset.dataset_id)
    await client.jobs.PlanTraining(job_service_pb2.PlanTrainingRequest(project_id=project.project_id), timeout=60)
    job = await client.start_training(project.project_id)
    await client.until_event(job.job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))
    download = artifact_service_pb2.DownloadArtifactRequest(job_id=job.job_id, name="report", path="metrics.json")
    assert [response.chunk async for response in client.artifacts.DownloadArtifact(download, timeout=60)]
    await client.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(job_id=job.job_id), timeout=60)


async def test_no_call_touches_the_disk_on_the_loop(tmp_path: Path, node: FakeGpuNode) -> None:
    async with control(tmp_path / "control", node) as client:
        await client.until_node_reachable()
        with _disk_touches(tmp_path) as seen:
            await _serve_every_kind_of_call(client)
        assert seen == []


async def test_the_listener_hears_a_touch(tmp_path: Path) -> None:
    with _disk_touches(tmp_path) as seen:
        (tmp_path / "file").write_text("x")
    assert [event for event, *_ in seen] == ["open"]
