"""A job's whole way through real servers, a real database and a node that is reached over real gRPC."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import grpc
import pytest

from control_service.config import NodeAddress
from tests.fakes.control import Client, control, error_info, is_state, is_step, reason_of
from tests.fakes.gpu_node import FakeGpuNode
from tests.fakes.gpu_refusal import Refusal
from tests.fakes.run_script import NUM_STEPS, artifact_files
from tunesmith.common.v1 import errors_pb2, event_pb2, plan_pb2
from tunesmith.control.v1 import artifact_service_pb2, job_service_pb2, node_service_pb2


async def _project(client: Client) -> int:
    dataset = await client.upload("rows")
    project = await client.create_project(dataset_id=dataset.dataset_id)
    return int(project.project_id)


async def _download(client: Client, **request: Any) -> bytes:
    content = b""
    async for response in client.artifacts.DownloadArtifact(
        artifact_service_pb2.DownloadArtifactRequest(**request), timeout=60
    ):
        assert 0 < len(response.chunk) <= 2**20
        content += response.chunk
    return content


async def test_a_job_goes_from_request_to_artifacts(client: Client, node: FakeGpuNode, tmp_path: Path) -> None:
    job = await client.start_training(await _project(client))
    assert job.state == event_pb2.JOB_STATE_QUEUED

    events = [event async for event in client.events(job.job_id)]

    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    states = [event.payload.job_state.state for event in events if event.kind == event_pb2.EVENT_KIND_JOB_STATE]
    assert states == [
        event_pb2.JOB_STATE_QUEUED,
        event_pb2.JOB_STATE_DISPATCHING,
        event_pb2.JOB_STATE_RUNNING,
        event_pb2.JOB_STATE_SUCCEEDED,
    ]
    steps = [event.payload.step.step for event in events if event.kind == event_pb2.EVENT_KIND_STEP]
    assert steps == list(range(1, NUM_STEPS + 1))
    done = await client.job(job.job_id)
    assert done.state == event_pb2.JOB_STATE_SUCCEEDED
    assert done.progress.step == NUM_STEPS
    assert done.last_sequence == len(events)
    assert done.spec.hyperparameters == job.spec.hyperparameters

    listed = await client.artifacts.ListArtifacts(artifact_service_pb2.ListArtifactsRequest(job_id=job.job_id))
    assert {artifact.name for artifact in listed.artifacts} == {"adapter", "report"}
    for artifact in listed.artifacts:
        expected = artifact_files(job.job_id)[artifact.name]
        assert {file.path for file in artifact.files} == set(expected)
        for file in artifact.files:
            content = await _download(client, job_id=job.job_id, name=artifact.name, path=file.path)
            assert content == expected[file.path]
            assert hashlib.sha256(content).hexdigest() == file.sha256
            assert (tmp_path / "control" / "output" / artifact.path / file.path).read_bytes() == content
    half = await _download(client, job_id=job.job_id, name="report", path="metrics.json", offset=1)
    assert half == b"}"


async def test_a_watch_that_opens_late_or_in_the_middle_sees_the_same_log(client: Client) -> None:
    job = await client.start_training(await _project(client))
    live = [event async for event in client.events(job.job_id)]
    assert [event async for event in client.events(job.job_id)] == live
    assert [event async for event in client.events(job.job_id, after_sequence=5)] == live[5:]
    page = await client.jobs.ListJobEvents(
        job_service_pb2.ListJobEventsRequest(job_id=job.job_id, after_sequence=2, page_size=3)
    )
    assert list(page.events) == live[2:5]
    assert page.last_sequence == len(live)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [event async for event in client.events(job.job_id, after_sequence=len(live) + 1)]
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert reason_of(caught.value) == "SEQUENCE_IN_FUTURE"


async def test_a_quiet_watch_gets_heartbeats_with_its_position(client: Client, node: FakeGpuNode) -> None:
    node.hold_at_step = 2
    job = await client.start_training(await _project(client))
    position = 0
    async for response in client.jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=job.job_id), timeout=60):
        if response.HasField("heartbeat") and position and not response.events:
            assert response.heartbeat.position == position
            break
        for event in response.events:
            if is_step(2)(event):
                position = event.sequence
    await node.release()


async def test_a_running_job_is_cancelled_and_keeps_its_log(client: Client, node: FakeGpuNode) -> None:
    node.hold_at_step = 2
    job = await client.start_training(await _project(client))
    await client.until_event(job.job_id, is_step(2))
    answer = await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job.job_id))
    assert answer.job.state in (event_pb2.JOB_STATE_CANCELLING, event_pb2.JOB_STATE_CANCELLED)
    events = [event async for event in client.events(job.job_id)]
    assert is_state(event_pb2.JOB_STATE_CANCELLED)(events[-1])
    assert not any(is_step(3)(event) for event in events)
    again = await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job.job_id))
    assert again.job.state == event_pb2.JOB_STATE_CANCELLED


async def test_the_same_request_id_gives_the_same_job(client: Client, node: FakeGpuNode) -> None:
    node.hold_at_step = 1
    project_id = await _project(client)
    first = await client.start_training(project_id, request_id="once")
    second = await client.start_training(project_id, request_id="once")
    assert first.job_id == second.job_id
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.start_training(project_id, request_id="once", priority=3)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert reason_of(caught.value) == "REQUEST_ID_REUSED"
    listed = await client.jobs.ListJobs(job_service_pb2.ListJobsRequest())
    assert [job.job_id for job in listed.jobs] == [first.job_id]
    assert not listed.jobs[0].HasField("spec")
    await node.release()


async def test_a_refused_plan_writes_no_job(client: Client, node: FakeGpuNode) -> None:
    project_id = await _project(client)
    node.plan_refusal = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "CHAT_TEMPLATE_MISSING",
        "the base has no chat template",
        {"stage": "TOKENIZER"},
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.start_training(project_id)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    info = error_info(caught.value)
    assert (info.reason, info.domain, info.metadata["stage"]) == ("CHAT_TEMPLATE_MISSING", "tunesmith", "TOKENIZER")
    assert (await client.jobs.ListJobs(job_service_pb2.ListJobsRequest())).jobs == []
    node.plan_refusal = None
    answer = await client.jobs.PlanTraining(
        job_service_pb2.PlanTrainingRequest(project_id=project_id, level=plan_pb2.PLAN_LEVEL_CHECK)
    )
    assert (answer.node, answer.plan.num_steps) == ("fake", NUM_STEPS)


async def test_jobs_run_in_order_and_say_why_they_wait(client: Client, node: FakeGpuNode) -> None:
    node.hold_at_step = 1
    project_id = await _project(client)
    first = await client.start_training(project_id)
    await client.until_event(first.job_id, is_step(1))
    second = await client.start_training(project_id)
    waiting = await client.job(second.job_id)
    assert waiting.queue_position == 1
    assert waiting.wait_reason != job_service_pb2.WAIT_REASON_UNSPECIFIED
    assert waiting.wait_message
    await node.release()
    await client.until_event(second.job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))
    assert [request.key.job_id for request in node.started] == [first.job_id, second.job_id]


async def test_a_paused_job_goes_on_from_its_checkpoint(client: Client, node: FakeGpuNode) -> None:
    node.hold_at_step = 2
    job = await client.start_training(await _project(client))
    await client.until_event(job.job_id, is_step(2))
    await client.jobs.PauseJob(job_service_pb2.PauseJobRequest(job_id=job.job_id))
    await client.until_event(job.job_id, is_state(event_pb2.JOB_STATE_PAUSED))
    listed = await client.jobs.ListCheckpoints(job_service_pb2.ListCheckpointsRequest(job_id=job.job_id))
    assert [(checkpoint.step, checkpoint.node) for checkpoint in listed.checkpoints] == [(2, "fake")]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.jobs.PauseJob(job_service_pb2.PauseJobRequest(job_id=job.job_id))
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_STATE")
    await node.release()
    await client.jobs.ResumeJob(job_service_pb2.ResumeJobRequest(job_id=job.job_id))
    events = [event async for event in client.events(job.job_id)]
    assert is_state(event_pb2.JOB_STATE_SUCCEEDED)(events[-1])
    steps = [event.payload.step.step for event in events if event.kind == event_pb2.EVENT_KIND_STEP]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert [event.payload.resumed.from_step for event in events if event.kind == event_pb2.EVENT_KIND_RESUMED] == [2]
    assert node.started[1].resume_from.step == 2


async def test_a_failure_arrives_typed_and_whole_and_the_job_can_be_retried(client: Client, node: FakeGpuNode) -> None:
    node.hold_at_step = 1
    job = await client.start_training(await _project(client))
    await client.until_event(job.job_id, is_step(1))
    failure = errors_pb2.Failure(
        reason=errors_pb2.ERROR_REASON_LOAD_TOKENIZER,
        fault=errors_pb2.FAULT_USER,
        message="the library's own words",
        stage="TOKENIZER",
        exception_type="builtins.OSError",
        file="tokenizer.json",
        versions={"transformers": "5.23.0"},
        exit_status=0,
    )
    await node.fail(job.job_id, 1, failure)
    events = [event async for event in client.events(job.job_id)]
    assert events[-1].payload.job_state.failure == failure
    failed = await client.job(job.job_id)
    assert (failed.state, failed.failure) == (event_pb2.JOB_STATE_FAILED, failure)
    await node.release()
    retried = await client.jobs.RetryJob(job_service_pb2.RetryJobRequest(job_id=job.job_id))
    assert retried.job.retry_of_job_id == job.job_id
    assert retried.job.spec == failed.spec
    await client.until_event(retried.job.job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))


async def test_deleting_an_artifact_and_a_job_frees_the_disk(client: Client, tmp_path: Path) -> None:
    job = await client.start_training(await _project(client))
    await client.until_event(job.job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))
    blobs, outputs = tmp_path / "control" / "blobs", tmp_path / "control" / "output"
    content = artifact_files(job.job_id)["adapter"]["adapter_model.safetensors"]
    digest = hashlib.sha256(content).hexdigest()
    assert (blobs / digest[:2] / digest).exists()
    for offset, code, reason in (
        (len(content) + 1, grpc.StatusCode.OUT_OF_RANGE, "INVALID_FIELD"),
        (-1, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _download(client, job_id=job.job_id, name="adapter", path="adapter_model.safetensors", offset=offset)
        assert (caught.value.code(), reason_of(caught.value)) == (code, reason)
    await client.artifacts.DeleteArtifact(
        artifact_service_pb2.DeleteArtifactRequest(job_id=job.job_id, name="adapter"), timeout=60
    )
    assert not (blobs / digest[:2] / digest).exists()
    assert not list(outputs.rglob("adapter*"))
    assert list(outputs.rglob("metrics.json"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _download(client, job_id=job.job_id, name="adapter", path="adapter_model.safetensors")
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.NOT_FOUND, "ARTIFACT_NOT_FOUND")
    await client.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(job_id=job.job_id), timeout=60)
    assert not list(outputs.rglob("metrics.json"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.job(job.job_id)
    assert reason_of(caught.value) == "JOB_NOT_FOUND"


async def test_a_run_is_followed_on_when_its_node_gets_another_address(client: Client, node: FakeGpuNode) -> None:
    node.hold_at_step = 2
    job = await client.start_training(await _project(client))
    await client.until_event(job.job_id, is_step(2))
    # The old connection is closed under the call that follows the run.
    await client.nodes.RegisterNode(
        node_service_pb2.RegisterNodeRequest(name=node.name, address=f"localhost:{node.port}")
    )
    await client.until_node_reachable()
    await node.release()
    await client.until_event(job.job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))
    assert (await client.job(job.job_id)).attempt == 1


async def test_two_nodes_take_a_job_each_and_a_third_waits(tmp_path: Path, node: FakeGpuNode) -> None:
    other = FakeGpuNode(name="other")
    await other.start()
    try:
        node.hold_at_step = other.hold_at_step = 1
        both = (NodeAddress(name=node.name, address=node.address), NodeAddress(name=other.name, address=other.address))
        async with control(tmp_path / "control", nodes=both) as client:
            await client.until_node_reachable(node.name)
            await client.until_node_reachable(other.name)
            project_id = await _project(client)
            first, second, third = [await client.start_training(project_id) for _ in range(3)]
            for job in (first, second):
                await client.until_event(job.job_id, is_step(1))
            assert {(await client.job(job.job_id)).node for job in (first, second)} == {node.name, other.name}
            waiting = await client.job(third.job_id)
            assert (waiting.state, waiting.queue_position) == (event_pb2.JOB_STATE_QUEUED, 1)
            assert waiting.wait_reason == job_service_pb2.WAIT_REASON_NODE_BUSY
            assert first.job_id in waiting.wait_message
            assert second.job_id in waiting.wait_message
            # It goes to whichever is free first.
            await other.release()
            await client.until_event(third.job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))
            assert (await client.job(third.job_id)).node == other.name
            assert len(node.started) == 1
            await node.release()
            for job in (first, second):
                await client.until_event(job.job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))
    finally:
        await other.close()
