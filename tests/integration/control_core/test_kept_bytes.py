"""Bytes stay while any record needs them: a copy of a checkpoint, and content that two jobs share."""

from __future__ import annotations

import asyncio

from control_service.app import jobs
from control_service.domain.artifact import CheckpointStatus
from control_service.domain.event import CheckpointFact
from control_service.domain.job_state import JobState
from tests.fakes.control_core import until
from tests.fakes.control_node import FakeNode
from tests.integration.control_core.conftest import OpenCore


async def test_a_copy_outlives_the_checkpoint_on_its_node(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    file = run.checkpoint(20)

    async def known() -> list[CheckpointStatus]:
        listed = await core.store.read(lambda tx: tx.checkpoints.list_for_job(job.job_id))
        return [checkpoint.status for checkpoint in listed]

    await until(lambda: file.sha256 in core.blobs.blobs)
    await core.until_job(job.job_id, lambda j: j.run_cursor == len(run.events))
    async with asyncio.timeout(30):
        while await known() != [CheckpointStatus.REPLICATED]:  # noqa: ASYNC110 - nothing tells a test of it
            await asyncio.sleep(0.005)
    status = CheckpointStatus.DELETED
    run.emit(CheckpointFact(name="step-00000020", step=20, status=status, size_bytes=0, manifest_sha256="", files=()))
    await core.until_job(job.job_id, lambda j: j.run_cursor == len(run.events))
    assert await known() == [CheckpointStatus.REPLICATED]
    assert file.sha256 in core.blobs.blobs
    # With nothing left on the node, the next attempt goes on from the copy.
    node.blobs.pop(file.sha256)
    run.fail("ENGINE_KILLED")
    await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)
    resume = node.run(job.job_id, 2).request.resume_from
    assert resume is not None
    assert [known.sha256 for known in resume.files] == [file.sha256]


async def test_bytes_that_two_jobs_have_go_with_the_second(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    for_both = []
    for _ in range(2):
        job = await core.start(project.project_id)
        await core.running(job.job_id)
        artifact = node.run(job.job_id).succeed(b"the same adapter")
        await core.until_state(job.job_id, JobState.SUCCEEDED)
        for_both.append(job.job_id)
    await jobs.delete_job(for_both[0], store=core.store, blobs=core.blobs, clock=core.clock)
    assert artifact.sha256 in core.blobs.blobs
    await jobs.delete_job(for_both[1], store=core.store, blobs=core.blobs, clock=core.clock)
    assert artifact.sha256 not in core.blobs.blobs
