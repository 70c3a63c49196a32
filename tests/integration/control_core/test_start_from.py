"""Jobs that start from earlier ones, and exports: whose bytes they hold, what they send, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from control_service.app import artifacts, jobs
from control_service.app.idempotency import RequestKey
from control_service.app.start_points import StartRequest
from control_service.domain.artifact import CheckpointStatus
from control_service.domain.errors import FailedPrecondition, InvalidArgument, NotFound
from control_service.domain.job import Job
from control_service.domain.job_state import JobState
from control_service.domain.start_from import start_files
from tests.fakes.control_core import Core, until
from tests.fakes.control_node import FakeNode
from tests.integration.control_core.conftest import OpenCore

_ADAPTER = b"weights of the adapter"
_SHA256 = hashlib.sha256(_ADAPTER).hexdigest()


async def _trained(core: Core, node: FakeNode) -> Job:
    project = await core.project()
    job = await core.start(project.project_id)
    await core.running(job.job_id)
    node.run(job.job_id).succeed(_ADAPTER)
    done = await core.until_state(job.job_id, JobState.SUCCEEDED)
    await until(lambda: bool(node.released))
    node.blobs.clear()
    return done


async def test_weights_are_pushed_and_outlive_their_job(open_core: OpenCore) -> None:
    """The earlier job goes while the new one waits; its bytes go when nobody can want them any more."""
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    earlier = await _trained(core, node)
    node.set_up(False)
    job = await core.start(earlier.project_id, start=StartRequest(job_id=earlier.job_id))
    assert job.spec.start_from["name"] == "adapter"
    assert job.spec.start_from["training_type"] == "qlora"
    assert [file.sha256 for file in start_files(job.spec)] == [_SHA256]
    # The base that the adapter was trained on, and no other.
    assert job.weights_digest == earlier.weights_digest != ""
    await artifacts.delete_artifact(earlier.job_id, "adapter", store=core.store, blobs=core.blobs, clock=core.clock)
    await jobs.delete_job(earlier.job_id, store=core.store, blobs=core.blobs, clock=core.clock)
    assert _SHA256 in core.blobs.blobs
    await core.restart()
    assert _SHA256 in core.blobs.blobs

    node.set_up(True)
    await core.running(job.job_id)
    assert node.blobs[_SHA256] == _ADAPTER
    (call,) = [call for call in node.start_calls if call.key.job_id == job.job_id]
    assert call.weights_digest == earlier.weights_digest
    node.run(job.job_id).succeed(b"later weights")
    await core.until_state(job.job_id, JobState.SUCCEEDED)
    await until(lambda: _SHA256 not in core.blobs.blobs)


async def test_a_failed_job_keeps_its_start_for_a_retry(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    earlier = await _trained(core, node)
    job = await core.start(earlier.project_id, max_retries=0, start=StartRequest(job_id=earlier.job_id))
    await core.running(job.job_id)
    node.run(job.job_id).fail("TRAINING")
    await core.until_state(job.job_id, JobState.FAILED)
    await jobs.delete_job(earlier.job_id, store=core.store, blobs=core.blobs, clock=core.clock)
    again = await core.retry(job.job_id)
    await core.running(again.job_id)
    assert again.weights_digest == job.weights_digest

    node.run(again.job_id).end(node.run(again.job_id).state.SUCCEEDED)
    await core.until_state(again.job_id, JobState.SUCCEEDED)
    # The failed job could be retried once more; deleting it lets go.
    assert _SHA256 in core.blobs.blobs
    await jobs.delete_job(job.job_id, store=core.store, blobs=core.blobs, clock=core.clock)
    # The one that succeeded is let go of behind its end.
    await until(lambda: _SHA256 not in core.blobs.blobs)


async def test_starts_from_a_copied_checkpoint_of_a_job_that_goes_on(open_core: OpenCore) -> None:
    node = FakeNode("a", num_devices=2)
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    running = await core.start(project.project_id)
    await core.running(running.job_id)
    node.run(running.job_id).checkpoint(20)

    async def copied() -> bool:
        found = await jobs.list_checkpoints(running.job_id, store=core.store)
        return any(checkpoint.status is CheckpointStatus.REPLICATED for checkpoint in found)

    await core.until_job(running.job_id, lambda job: job.last_sequence > 5)
    while not await copied():
        await core.clock.sleep(0.01)
    start = StartRequest(job_id=running.job_id, checkpoint="step-00000020")
    job = await core.start(project.project_id, start=start)
    assert job.spec.start_from["name"] == "step-00000020"
    await core.running(job.job_id)

    with pytest.raises(NotFound) as refused:
        await core.start(project.project_id, start=StartRequest(job_id=running.job_id, checkpoint="step-00000001"))
    assert refused.value.reason == "CHECKPOINT_NOT_FOUND"
    assert refused.value.details["checkpoints"] == "step-00000020"


async def test_what_cannot_be_started_from(open_core: OpenCore) -> None:
    node = FakeNode("a", models=("org/base", "org/other"))
    core = await open_core(node)
    await core.reachable()
    earlier = await _trained(core, node)
    other = await core.project("other", base_model="org/other")
    with pytest.raises(InvalidArgument) as refused:
        await core.start(other.project_id, start=StartRequest(job_id=earlier.job_id))
    assert refused.value.reason == "COMBINATION_NOT_ALLOWED"
    assert refused.value.details["found"] == "org/base"
    assert refused.value.details["wanted"] == "org/other"

    with pytest.raises(NotFound, match="JOB_NOT_FOUND"):
        await core.start(earlier.project_id, start=StartRequest(job_id="0" * 26))
    empty = await core.start(earlier.project_id)
    with pytest.raises(NotFound, match="ARTIFACT_NOT_FOUND"):
        await core.start(earlier.project_id, start=StartRequest(job_id=empty.job_id))


async def test_an_export_is_a_job_of_its_own(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    earlier = await _trained(core, node)
    request = RequestKey(method="ExportArtifact", request_id="same", body_digest="d")
    job = await core.export(earlier.job_id, request=request)
    assert (await core.export(earlier.job_id, request=request)).job_id == job.job_id

    assert job.spec.task == "export"
    assert job.spec.hyperparameters["exports"] == ["merged"]
    assert (job.spec.traits, job.spec.datasets) == ((), ())
    assert job.project_id == earlier.project_id
    assert Path(job.output_path).parent == Path(earlier.output_path).parent
    await core.running(job.job_id)
    # None of the data goes along.
    assert set(node.blobs) == {_SHA256}
    with pytest.raises(FailedPrecondition, match="JOB_STATE"):
        await core.export(job.job_id)

    node.plan_error = FailedPrecondition("NOT_OFFERED", "no converter")
    with pytest.raises(FailedPrecondition, match="NOT_OFFERED"):
        await core.export(earlier.job_id)
