"""The blocking and the asyncio client against a real server: errors, repeats, uploads, downloads."""

import asyncio
import hashlib
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.fakes.scripted_control import FakeControl, refuse
from tunesmith.common.v1 import errors_pb2, event_pb2, file_pb2
from tunesmith.control.v1 import artifact_service_pb2, dataset_service_pb2, job_service_pb2, project_service_pb2
from tunesmith_client import (
    AsyncClient,
    Client,
    ClientConfig,
    InvalidArgument,
    JobFailed,
    NotFound,
    RetryPolicy,
    TransferDamaged,
    TransferProgress,
    TunesmithError,
    Unavailable,
)

QUICK = RetryPolicy(initial_backoff_seconds=0.01, max_backoff_seconds=0.02)
CONTENT = b"0123456789" * 300_000


def config(address: str) -> ClientConfig:
    return ClientConfig(address=address, retry=QUICK)


def artifact(content: bytes = CONTENT, path: str = "adapter/weights.bin") -> artifact_service_pb2.Artifact:
    file = file_pb2.FileReference(path=path, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
    return artifact_service_pb2.Artifact(job_id="j", name="adapter", files=[file])


class BreakingDownload:
    """Sends CONTENT from the offset, and breaks the stream after the first chunk once."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def __call__(self, request: artifact_service_pb2.DownloadArtifactRequest, context: grpc.ServicerContext) -> Any:
        self.offsets.append(request.offset)
        for start in range(request.offset, len(CONTENT), 1 << 20):
            if start and len(self.offsets) == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the wire broke")
            yield artifact_service_pb2.DownloadArtifactResponse(chunk=CONTENT[start : start + (1 << 20)])


def busy_twice(request: project_service_pb2.DeleteProjectRequest, context: grpc.ServicerContext) -> Any:
    busy_twice.seen.append(request.request_id)  # type: ignore[attr-defined]
    if len(busy_twice.seen) < 3:  # type: ignore[attr-defined]
        refuse(context, grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
    return project_service_pb2.DeleteProjectResponse()


def store_upload(requests: Any, context: grpc.ServicerContext) -> dataset_service_pb2.UploadDatasetResponse:
    header = next(requests).header
    content = b"".join(part.chunk for part in requests)
    if hashlib.sha256(content).hexdigest() != header.sha256:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "CHECKSUM_MISMATCH")
    dataset = dataset_service_pb2.Dataset(dataset_id=1, name=header.name, sha256=header.sha256, size_bytes=len(content))
    return dataset_service_pb2.UploadDatasetResponse(dataset=dataset)


def test_a_refusal_arrives_typed_with_everything_it_carries() -> None:
    def no_model(request: Any, context: grpc.ServicerContext) -> Any:
        refuse(
            context,
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "rank is too large",
            violations={"project.hyperparameters.lora.rank": "at most 1024"},
            request_id="log-7",
        )

    with FakeControl() as control, Client(control.address) as client:
        control.handlers["GetModel"] = no_model
        with pytest.raises(InvalidArgument) as raised:
            client.models.get("org/name")
        assert raised.value.reason == "INVALID_FIELD"
        assert raised.value.field_violations[0].field == "project.hyperparameters.lora.rank"
        assert raised.value.request_id == "log-7"


def test_a_mutation_is_repeated_with_the_same_request_id() -> None:
    busy_twice.seen = []  # type: ignore[attr-defined]
    with FakeControl() as control, Client(config=config(control.address)) as client:
        control.handlers["DeleteProject"] = busy_twice
        client.projects.delete(7)
        ids = {request.request_id for request in control.calls("DeleteProject")}
        assert len(control.calls("DeleteProject")) == 3
        assert len(ids) == 1
        assert ids != {""}


async def test_asyncio_repeats_with_the_same_request_id_too() -> None:
    busy_twice.seen = []  # type: ignore[attr-defined]
    with FakeControl() as control:
        async with AsyncClient(config=config(control.address)) as client:
            control.handlers["DeleteProject"] = busy_twice
            await client.projects.delete(7)
        assert len({request.request_id for request in control.calls("DeleteProject")}) == 1


def test_a_refusal_is_not_repeated() -> None:
    def missing(request: Any, context: grpc.ServicerContext) -> Any:
        refuse(context, grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")

    with FakeControl() as control, Client(config=config(control.address)) as client:
        control.handlers["GetJob"] = missing
        with pytest.raises(NotFound):
            client.jobs.get("j")
        assert len(control.calls("GetJob")) == 1


def test_nobody_there_is_unavailable_after_the_policys_attempts() -> None:
    with FakeControl() as control:
        address = control.address
    policy = RetryPolicy(max_attempts=3, initial_backoff_seconds=0.01, max_backoff_seconds=0.02)
    with Client(config=ClientConfig(address=address, retry=policy)) as client, pytest.raises(Unavailable):
        client.nodes.list()


class CutShort:
    """Ends calls with the bare CANCELLED of a server that was stopped under them, a few times; then answers."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, request: project_service_pb2.DeleteProjectRequest, context: grpc.ServicerContext) -> Any:
        self.num_calls += 1
        if self.num_calls <= 12:
            context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
        return project_service_pb2.DeleteProjectResponse()


async def test_a_call_that_a_stopped_server_cut_short_is_made_again() -> None:
    with FakeControl() as control:
        control.handlers["DeleteProject"] = CutShort()
        with Client(config=config(control.address)) as client:
            client.projects.delete(7)
        control.handlers["DeleteProject"] = CutShort()
        async with AsyncClient(config=config(control.address)) as asking:
            await asking.projects.delete(8)


async def test_closing_an_asyncio_client_ends_the_calls_of_its_other_tasks() -> None:
    """None of the tasks was cancelled, and none is told so."""
    with FakeControl() as control:
        address = control.address
    asking = AsyncClient(config=ClientConfig(address=address, deadline_seconds=3600.0))
    calls = [asyncio.create_task(asking.nodes.list()) for _ in range(2)]
    await asyncio.sleep(0)
    await asking.close()
    # One that comes too late.
    calls.append(asyncio.create_task(asking.nodes.list()))
    for answer in await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60):
        assert isinstance(answer, TunesmithError)


async def test_a_task_that_is_cancelled_while_its_client_is_closed_stays_cancelled() -> None:
    with FakeControl() as control:
        address = control.address
    asking = AsyncClient(config=ClientConfig(address=address, deadline_seconds=3600.0))
    calling = asyncio.create_task(asking.nodes.list())
    await asyncio.sleep(0)
    calling.cancel()
    await asking.close()
    with pytest.raises(asyncio.CancelledError):
        await calling


def test_closing_a_client_ends_the_repeats_of_its_other_threads() -> None:
    with FakeControl() as control:
        address = control.address
    caught: list[TunesmithError] = []
    client = Client(config=ClientConfig(address=address, deadline_seconds=3600.0))

    def call() -> None:
        try:
            client.nodes.list()
        except TunesmithError as error:
            caught.append(error)

    calling = threading.Thread(target=call)
    calling.start()
    client.close()
    calling.join(60.0)
    assert not calling.is_alive()
    assert len(caught) == 1


def test_pages_are_fetched_while_iterating() -> None:
    def page(request: project_service_pb2.ListProjectsRequest, _: grpc.ServicerContext) -> Any:
        first = int(request.page_token or 1)
        projects = [project_service_pb2.Project(project_id=first), project_service_pb2.Project(project_id=first + 1)]
        return project_service_pb2.ListProjectsResponse(
            projects=projects, next_page_token=str(first + 2) if first < 5 else ""
        )

    with FakeControl() as control, Client(control.address) as client:
        control.handlers["ListProjects"] = page
        assert [project.project_id for project in client.projects.list()] == [1, 2, 3, 4, 5, 6]


def test_upload_sends_the_file_and_tells_how_far_it_is(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(CONTENT)
    seen: list[TransferProgress] = []
    with FakeControl() as control, Client(control.address) as client:
        control.handlers["UploadDataset"] = store_upload
        dataset = client.datasets.upload(file, name="rows", progress=seen.append)
    assert dataset.size_bytes == len(CONTENT)
    assert seen[-1] == TransferProgress(path="rows.jsonl", done_bytes=len(CONTENT), total_bytes=len(CONTENT))


async def test_asyncio_upload(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(CONTENT)
    with FakeControl() as control:
        control.handlers["UploadDataset"] = store_upload
        async with AsyncClient(control.address) as client:
            assert (await client.datasets.upload(file, name="rows")).name == "rows"


async def test_both_facades_ask_for_tokens_and_rendered_rows_in_the_same_words() -> None:
    with FakeControl() as control:
        control.handlers["GetDataset"] = lambda *_: dataset_service_pb2.GetDatasetResponse()
        control.handlers["PreviewDataset"] = lambda *_: dataset_service_pb2.PreviewDatasetResponse()
        with Client(control.address) as client:
            client.datasets.get(1, base_model="org/tiny")
            client.datasets.preview(1, num_rows=2, base_model="org/tiny", chat_template="chatml", loss_on="all")
        async with AsyncClient(control.address) as aio:
            await aio.datasets.get(1, base_model="org/tiny")
            await aio.datasets.preview(1, num_rows=2, base_model="org/tiny", chat_template="chatml", loss_on="all")
        for name in ("GetDataset", "PreviewDataset"):
            first, second = control.requests[name]
            assert first == second
            assert first.base_model == "org/tiny"


def serve_artifact(control: FakeControl, download: Any, what: artifact_service_pb2.Artifact) -> None:
    control.handlers["ListArtifacts"] = lambda *_: artifact_service_pb2.ListArtifactsResponse(artifacts=[what])
    control.handlers["DownloadArtifact"] = download


def test_a_broken_download_goes_on_from_its_offset(tmp_path: Path) -> None:
    download = BreakingDownload()
    with FakeControl() as control, Client(config=config(control.address)) as client:
        serve_artifact(control, download, artifact())
        paths = client.artifacts.download("j", "adapter", tmp_path)
        assert [path.read_bytes() for path in paths] == [CONTENT]
        assert download.offsets == [0, 1 << 20]
        client.artifacts.download("j", "adapter", tmp_path)
        assert download.offsets == [0, 1 << 20], "what is there already is not fetched again"


async def test_asyncio_download_goes_on_from_its_offset(tmp_path: Path) -> None:
    download = BreakingDownload()
    with FakeControl() as control:
        serve_artifact(control, download, artifact())
        async with AsyncClient(config=config(control.address)) as client:
            paths = await client.artifacts.download("j", "adapter", tmp_path)
    assert [path.read_bytes() for path in paths] == [CONTENT]
    assert download.offsets == [0, 1 << 20]


def test_damaged_bytes_are_not_kept(tmp_path: Path) -> None:
    small = artifact(b"0" * 100)

    def wrong(request: Any, _: grpc.ServicerContext) -> Any:
        yield artifact_service_pb2.DownloadArtifactResponse(chunk=b"x" * 100)

    with FakeControl() as control, Client(config=config(control.address)) as client:
        serve_artifact(control, wrong, small)
        with pytest.raises(TransferDamaged):
            client.artifacts.download("j", "adapter", tmp_path)
    assert not (tmp_path / "adapter" / "weights.bin").exists()


def test_an_artifact_that_names_a_path_outside_is_refused(tmp_path: Path) -> None:
    with FakeControl() as control, Client(control.address) as client:
        serve_artifact(control, BreakingDownload(), artifact(path="../../evil"))
        with pytest.raises(TransferDamaged):
            client.artifacts.download("j", "adapter", tmp_path)
        assert control.calls("DownloadArtifact") == []


def test_waiting_for_a_failed_job_raises_its_reason() -> None:
    job = job_service_pb2.Job(job_id="j", state=event_pb2.JOB_STATE_FAILED)
    job.failure.reason = errors_pb2.ERROR_REASON_ENGINE_KILLED
    job.failure.message = "killed by signal 9"
    with FakeControl() as control, Client(control.address) as client:
        control.handlers["WatchJob"] = lambda *_: iter(())
        control.handlers["GetJob"] = lambda *_: job_service_pb2.GetJobResponse(job=job)
        with pytest.raises(JobFailed) as raised:
            client.jobs.wait("j")
        assert (raised.value.reason, raised.value.state, raised.value.job_id) == ("ENGINE_KILLED", "FAILED", "j")
        assert client.jobs.wait("j", check=False).state == event_pb2.JOB_STATE_FAILED
