"""Cancel in every state, and runs that nobody wants any more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from control_service.app import datasets, jobs
from control_service.app.idempotency import RequestKey
from control_service.domain.artifact import ArtifactKind
from control_service.domain.errors import FailedPrecondition, NotFound, ResourceExhausted
from control_service.domain.event import ArtifactFact
from control_service.domain.job_state import JobState
from control_service.domain.run import RunState, StopMode
from tests.fakes.control_core import until
from tests.fakes.control_node import FakeNode, FakeRun
from tests.integration.control_core.conftest import OpenCore

_STRAY_JOB_ID = "01J00000000000000000000000"


async def test_cancel_while_queued_is_at_once(open_core: OpenCore) -> None:
    node = FakeNode("a")
    node.is_up = False
    core = await open_core(node)
    job = await core.start((await core.project()).project_id)
    cancelled = await core.cancel(job.job_id)
    assert cancelled.state is JobState.CANCELLED
    assert cancelled.end_time is not None
    # A job that is over is answered as it is.
    assert (await core.cancel(job.job_id)).state is JobState.CANCELLED
    assert [event.sequence for event in await core.watch(job.job_id)] == [1, 2]


async def test_cancel_while_dispatching(open_core: OpenCore) -> None:
    node = FakeNode("a")
    node.on_start = lambda run: node.set_up(False)
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await until(lambda: not node.is_up)
    assert (await core.view(job.job_id)).job.state in (JobState.DISPATCHING, JobState.RUNNING)
    assert (await core.cancel(job.job_id)).state is JobState.CANCELLING
    node.set_up(True)
    await core.until_state(job.job_id, JobState.CANCELLED)


async def test_cancel_while_running_waits_for_the_runs_own_word(open_core: OpenCore) -> None:
    node = FakeNode("a")
    node.obeys_stop = False
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    assert (await core.cancel(job.job_id)).state is JobState.CANCELLING
    await until(lambda: run.stops == [StopMode.CANCEL])
    run.step(7)
    job_now = await core.until_job(job.job_id, lambda j: j.progress.step == 7)
    assert job_now.state is JobState.CANCELLING
    run.end(RunState.CANCELLED)
    await core.until_state(job.job_id, JobState.CANCELLED)
    assert run.stops == [StopMode.CANCEL]


async def test_cancel_while_pausing_and_while_paused(open_core: OpenCore) -> None:
    node = FakeNode("a")
    node.obeys_stop = False
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    job = await core.start(project.project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    await core.pause(job.job_id)
    await until(lambda: run.stops == [StopMode.CHECKPOINT])
    await core.cancel(job.job_id)
    await until(lambda: run.stops == [StopMode.CHECKPOINT, StopMode.CANCEL])
    run.end(RunState.CANCELLED)
    await core.until_state(job.job_id, JobState.CANCELLED)

    node.obeys_stop = True
    other = await core.start(project.project_id)
    await core.running(other.job_id)
    await core.pause(other.job_id)
    await core.until_state(other.job_id, JobState.PAUSED)
    assert (await core.cancel(other.job_id)).state is JobState.CANCELLED


async def test_cancel_while_collecting_gives_no_artifacts(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    # The node falls silent right after the run's last word, so collecting cannot end.
    node.run(job.job_id).succeed()
    node.set_up(False)
    await core.until_job(job.job_id, lambda j: j.state is JobState.RUNNING)
    state = (await core.cancel(job.job_id)).state
    assert state is JobState.CANCELLING
    node.set_up(True)
    await core.until_state(job.job_id, JobState.CANCELLED)
    assert core.blobs.outputs == {}


async def test_verbs_are_refused_in_states_that_do_not_allow_them(open_core: OpenCore) -> None:
    node = FakeNode("a")
    node.is_up = False
    core = await open_core(node)
    job = await core.start((await core.project()).project_id)
    for verb in (core.pause, core.resume):
        with pytest.raises(FailedPrecondition) as refused:
            await verb(job.job_id)
        assert refused.value.reason == "JOB_STATE"
        assert refused.value.details["state"] == "QUEUED"
    with pytest.raises(FailedPrecondition, match="JOB_STATE"):
        await jobs.delete_job(job.job_id, store=core.store, blobs=core.blobs, clock=core.clock)
    with pytest.raises(NotFound, match="JOB_NOT_FOUND"):
        await core.cancel("01J00000000000000000000000")


async def test_a_run_of_a_job_that_is_gone_is_stopped_and_released(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    request = node.run(job.job_id).request
    stray = FakeRun(node, replace(request, key=replace(request.key, job_id=_STRAY_JOB_ID)))
    node.runs[(_STRAY_JOB_ID, 1)] = stray
    stray.begin()
    await until(lambda: stray.stops == [StopMode.CANCEL])
    await until(lambda: stray.request.key in node.released)
    assert node.run(job.job_id).stops == []


async def test_delete_frees_the_log_the_output_and_the_bytes(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    artifact = node.run(job.job_id).succeed(b"only this job has it")
    await core.until_state(job.job_id, JobState.SUCCEEDED)
    assert artifact.sha256 in core.blobs.blobs
    await jobs.delete_job(job.job_id, store=core.store, blobs=core.blobs, clock=core.clock)
    assert core.blobs.outputs == {}
    assert artifact.sha256 not in core.blobs.blobs
    with pytest.raises(NotFound, match="JOB_NOT_FOUND"):
        await core.view(job.job_id)


async def test_a_delete_that_could_not_free_the_output_can_be_done_again(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    artifact = node.run(job.job_id).succeed(b"only this job has it")
    await core.until_state(job.job_id, JobState.SUCCEEDED)
    request = RequestKey(method="DeleteJob", request_id="r", body_digest="d")

    async def delete() -> None:
        await jobs.delete_job(job.job_id, store=core.store, blobs=core.blobs, clock=core.clock, request=request)

    core.blobs.is_broken = True
    with pytest.raises(ResourceExhausted):
        await delete()
    # Nothing is on the disk that no record tells of.
    assert (await core.view(job.job_id)).job.state is JobState.SUCCEEDED
    core.blobs.is_broken = False
    await delete()
    assert core.blobs.outputs == {}
    assert artifact.sha256 not in core.blobs.blobs
    await delete()


async def test_blobs_that_no_record_names_are_freed_at_start(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    done = await core.start(project.project_id)
    await core.running(done.job_id)
    kept = node.run(done.job_id).succeed(b"an artifact")
    await core.until_state(done.job_id, JobState.SUCCEEDED)
    collecting = await core.start(project.project_id)
    await core.running(collecting.job_id)
    # One of two artifacts was copied when control died.
    first = node.run(collecting.job_id)
    first.emit(ArtifactFact(name="report", kind=ArtifactKind.REPORT, files=(node.add_file(b"report", "r.json"),)))
    node.reads_blobs = False
    second = first.succeed(b"another artifact")
    await core.until_job(collecting.job_id, lambda j: j.run_state is RunState.SUCCEEDED)
    await core.close()
    half = core.blobs.add(b"report")
    forgotten = core.blobs.add(b"a dead upload")
    await core.open()
    assert forgotten.sha256 not in core.blobs.blobs
    dataset = await datasets.get_dataset(1, store=core.store)
    assert {kept.sha256, dataset.sha256} <= core.blobs.blobs.keys()
    assert half.sha256 in core.blobs.blobs
    node.reads_blobs = True
    await core.until_state(collecting.job_id, JobState.SUCCEEDED)
    assert {half.sha256, second.sha256} <= core.blobs.blobs.keys()
