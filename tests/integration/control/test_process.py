"""Control as a process: killed and started again, told to stop, and a second one beside it."""

from __future__ import annotations

import asyncio
import errno
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.fakes.control import PATIENCE_SECONDS, Client, ControlProcess, is_state, is_step, reason_of
from tests.fakes.gpu_node import FakeGpuNode
from tests.fakes.run_script import NUM_STEPS
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2, job_service_pb2_grpc, project_service_pb2


@asynccontextmanager
async def _running(directory: Path, *flags: str) -> AsyncIterator[tuple[ControlProcess, Client]]:
    """A process that is ended with the test, and a client of it."""
    process = await ControlProcess.start(directory, *flags)
    try:
        client = Client(await process.until_ready())
        try:
            yield process, client
        finally:
            await client.close()
    finally:
        await process.end(signal.SIGKILL)


async def _start_job(client: Client) -> str:
    await client.until_node_reachable()
    dataset = await client.upload("rows")
    project = await client.create_project(dataset_id=dataset.dataset_id)
    return str((await client.start_training(project.project_id)).job_id)


async def test_a_kill_in_the_middle_of_a_run_loses_nothing(tmp_path: Path, node: FakeGpuNode) -> None:
    flags = ("--node", f"fake={node.address}", "--node-heartbeat-seconds", "0.5")
    node.hold_at_step = 2
    async with _running(tmp_path, *flags) as (process, client):
        job_id = await _start_job(client)
        before = await client.until_event(job_id, is_step(2))
        await process.end(signal.SIGKILL)
    # The node trains on while nobody listens.
    await node.release()
    async with _running(tmp_path, *flags) as (process, client):
        after = await client.until_event(
            job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED), after_sequence=before[-1].sequence
        )
        events = [*before, *after]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        steps = [event.payload.step.step for event in events if event.kind == event_pb2.EVENT_KIND_STEP]
        assert steps == list(range(1, NUM_STEPS + 1))
        assert [event async for event in client.events(job_id)] == events
        assert (await client.job(job_id)).attempt == 1
        assert len(node.started) == 1
        assert await process.end() == 0


async def test_sigterm_ends_watches_with_a_reason_and_exits_clean(tmp_path: Path, node: FakeGpuNode) -> None:
    node.hold_at_step = 1
    async with _running(tmp_path, "--node", f"fake={node.address}") as (process, client):
        job_id = await _start_job(client)
        reached = asyncio.Event()

        async def watch() -> None:
            async for event in client.events(job_id):
                if is_step(1)(event):
                    reached.set()

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(PATIENCE_SECONDS):
            await reached.wait()
        assert await process.end(signal.SIGTERM) == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watching
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "SHUTTING_DOWN"
        assert not process.ready_file.exists()
    await node.release()


async def _call_until_gone(address: str) -> list[tuple[grpc.StatusCode, str]]:
    """Bare calls without a pause, until nobody listens; what they were told."""
    told: list[tuple[grpc.StatusCode, str]] = []
    async with grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        while True:
            try:
                await jobs.ListJobs(job_service_pb2.ListJobsRequest(), timeout=PATIENCE_SECONDS)
            except grpc.aio.AioRpcError as error:
                told.append((error.code(), str(error.details())))
                if "Connection refused" in str(error.details()):
                    return told


async def test_bare_calls_that_meet_a_stop_are_told_to_call_again_and_nothing_else(tmp_path: Path) -> None:
    # What a server has received and not begun to serve when it stops is where gRPC itself says CANCELLED.
    async with _running(tmp_path) as (process, client):
        address = await process.until_ready()
        callers = [asyncio.create_task(_call_until_gone(address)) for _ in range(24)]
        await client.projects.ListProjects(project_service_pb2.ListProjectsRequest())
        assert await process.end(signal.SIGTERM) == 0
        async with asyncio.timeout(PATIENCE_SECONDS):
            told = [each for caller in await asyncio.gather(*callers) for each in caller]
        assert {code for code, _ in told} == {grpc.StatusCode.UNAVAILABLE}, told


async def test_a_health_watch_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    # Longer than the patience of the test: waiting for the grace would fail it.
    async with _running(tmp_path, "--grace-seconds", "600") as (process, client):
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert await process.end(signal.SIGTERM) == 0
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("place", ["store.before-commit", "store.after-commit"])
async def test_an_error_at_the_store_ends_no_writer(tmp_path: Path, place: str) -> None:
    for name in ("armed", "taken"):
        (tmp_path / "failpoints" / name).mkdir(parents=True)
    process = await ControlProcess.start(tmp_path, environment={"TUNESMITH_FAILPOINTS": str(tmp_path / "failpoints")})
    try:
        client = Client(await process.until_ready())
        order = json.dumps({"action": "raise", "errno": errno.EIO})
        (tmp_path / "failpoints" / "armed" / place).write_text(order)
        async with asyncio.timeout(PATIENCE_SECONDS):
            # By then somebody met it: health takes the lock every few seconds.
            for number in range(3):
                with suppress(grpc.aio.AioRpcError):
                    await client.upload(f"rows-{number}")
            assert not any((tmp_path / "failpoints" / "armed").iterdir())
            await client.upload("afterwards")
        await client.close()
        assert await process.end() == 0
    finally:
        await process.end(signal.SIGKILL)


async def test_a_second_process_refuses_and_leaves_the_first_unharmed(tmp_path: Path) -> None:
    async with _running(tmp_path) as (first, client):
        same_directory = await ControlProcess.start(tmp_path, "--ready-file", str(tmp_path / "other.json"))
        assert await same_directory.exit_code() == 3
        assert "in use by another process" in same_directory.errors.read_text()
        assert str(first.process.pid) in same_directory.errors.read_text()

        (tmp_path / "second").mkdir()
        address = await first.until_ready()
        same_port = await ControlProcess.start(tmp_path / "second", "--address", address)
        assert await same_port.exit_code() == 3
        assert address in same_port.errors.read_text()

        assert (await client.projects.ListProjects(project_service_pb2.ListProjectsRequest())).projects == []
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert await first.end(signal.SIGINT) == 0


async def test_a_ready_file_of_a_killed_process_is_not_believed(tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    ready_file.write_text('{"address": "127.0.0.1:1", "pid": 1}')
    # It cannot serve, so nothing new is announced; what is left would be the lie.
    process = await ControlProcess.start(tmp_path, "--address", "127.0.0.1:1", "--output-root", "/dev/null/x")
    assert await process.exit_code() != 0
    assert not ready_file.exists()


async def test_bad_settings_are_named_and_exit_2(tmp_path: Path) -> None:
    for flags, environment, text in (
        ((), {"TUNESMITH_CONTROL_COLOUR": "blue"}, "TUNESMITH_CONTROL_COLOUR"),
        (("--grace-seconds", "-1"), {}, "grace_seconds"),
        (("--address", "0.0.0.0:0"), {}, "loopback"),
    ):
        process = await ControlProcess.start(tmp_path, *flags, environment=environment)
        assert await process.exit_code() == 2
        assert text in process.errors.read_text()


async def test_a_log_line_carries_the_request_and_the_job(tmp_path: Path) -> None:
    async with _running(tmp_path) as (process, client):
        call = client.jobs.GetJob(
            job_service_pb2.GetJobRequest(job_id="01ARZ3NDEKTSV4RRFFQ69G5FAV"), metadata=(("x-request-id", "my-id"),)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert ("x-request-id", "my-id") in tuple(caught.value.trailing_metadata() or ())
        await process.end()
        line = next(line for line in process.errors.read_text().splitlines() if "my-id" in line)
        assert '"job_id": "01ARZ3NDEKTSV4RRFFQ69G5FAV"' in line
        assert '"code": "NOT_FOUND"' in line
        assert '"service": "control"' in line


async def test_every_line_about_a_job_carries_its_id(tmp_path: Path, node: FakeGpuNode) -> None:
    node.hold_at_step = 1
    flags = ("--node", f"fake={node.address}", "--node-heartbeat-seconds", "0.5")
    async with _running(tmp_path, *flags) as (process, client):
        await client.until_node_reachable()
        dataset = await client.upload("rows")
        project = await client.create_project(dataset_id=dataset.dataset_id)
        call = client.jobs.StartTraining(
            job_service_pb2.StartTrainingRequest(project_id=project.project_id), metadata=(("x-request-id", "mine"),)
        )
        job_id = (await call).job.job_id
        await client.until_event(job_id, is_step(1))
        # The line of a stream that breaks comes from the task that follows the run.
        await node.stop()
        await node.start()
        await node.release()
        await client.until_event(job_id, is_state(event_pb2.JOB_STATE_SUCCEEDED))
        await process.end()
        lines = [json.loads(line) for line in process.errors.read_text().splitlines() if line.startswith("{")]
        assert [line["job_id"] for line in lines if line.get("request_id") == "mine"] == [job_id]
        about_the_job = [line for line in lines if job_id in json.dumps(line)]
        assert {"job-dispatching", "activity-ended", "job-succeeded"} <= {line["event"] for line in about_the_job}
        assert all(line.get("job_id") == job_id for line in about_the_job)
