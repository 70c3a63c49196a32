"""What a job goes on from after its node, its disk or a checkpoint was lost: the best checkpoint that is left."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from control_service.app.jobs import list_checkpoints
from control_service.app.runtime import RetentionConfig
from control_service.domain.artifact import CheckpointStatus, FileReference
from control_service.domain.event import CheckpointFact, WarningFact
from control_service.domain.failure import Fault
from control_service.domain.job_state import JobState
from tests.fakes.control_core import Core, quick_config, until
from tests.fakes.control_node import FakeNode
from tests.integration.control_core.conftest import OpenCore

_NO_COPIES = RetentionConfig(replicate_checkpoint_max_bytes=0)


async def _behind_two_checkpoints(open_core: OpenCore, *, has_copy: bool) -> tuple[Core, FakeNode, str, FileReference]:
    """A job that runs behind steps 20 and 40, of which control has a copy of the later or none; the later's file."""
    node = FakeNode("a")
    core = await open_core(node, config=quick_config(None if has_copy else _NO_COPIES))
    await core.reachable()
    job_id = (await core.start((await core.project()).project_id)).job_id
    await core.running(job_id)
    run = node.run(job_id)
    run.checkpoint(20, b"earlier")
    file = run.checkpoint(40, b"later")
    await core.until_job(job_id, lambda job: job.run_cursor == len(run.events))
    if has_copy:
        await until(lambda: file.sha256 in core.blobs.blobs)
    return core, node, job_id, file


async def _gone_on_from_its_checkpoint(open_core: OpenCore) -> tuple[Core, FakeNode, str]:
    """A job whose second attempt goes on from step 20, of which its node has the only copy."""
    node = FakeNode("a")
    core = await open_core(node, config=quick_config(_NO_COPIES))
    await core.reachable()
    job_id = (await core.start((await core.project()).project_id)).job_id
    await core.running(job_id)
    node.run(job_id).checkpoint(20)
    node.run(job_id).fail("ENGINE_KILLED", Fault.HARDWARE)
    await core.until_job(job_id, lambda job: job.attempt == 2 and job.state is JobState.RUNNING)
    return core, node, job_id


async def test_a_checkpoint_behind_one_on_a_lost_node_is_replicated(open_core: OpenCore) -> None:
    first, second = FakeNode("a"), FakeNode("b")
    config = quick_config()
    core = await open_core(first, second, config=replace(config, nodes=replace(config.nodes, lease_seconds=0.3)))
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    assert (await core.running(job.job_id)).node == "a"
    early = first.run(job.job_id).checkpoint(20)
    await until(lambda: early.sha256 in core.blobs.blobs)
    # Its bytes are refused, so that it stays on its node.
    late = first.run(job.job_id).checkpoint(40)
    first.blobs[late.sha256] = b"damaged"
    await core.until_job(job.job_id, lambda j: j.run_cursor == len(first.run(job.job_id).events))
    first.set_up(False)
    moved = await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)
    assert moved.node == "b"
    between = second.run(job.job_id, 2).checkpoint(30)
    await until(lambda: between.sha256 in core.blobs.blobs)


async def test_a_lost_job_whose_checkpoint_only_its_node_has_waits_for_it(open_core: OpenCore) -> None:
    first, second = FakeNode("a"), FakeNode("b")
    config = quick_config(RetentionConfig(replicate_checkpoint_max_bytes=0))
    core = await open_core(first, second, config=replace(config, nodes=replace(config.nodes, lease_seconds=0.3)))
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    assert (await core.running(job.job_id)).node == "a"
    first.run(job.job_id).checkpoint(20)
    await core.until_job(job.job_id, lambda j: j.run_cursor == len(first.run(job.job_id).events))
    first.set_up(False)
    await core.until_job(job.job_id, lambda j: j.node_unreachable)
    first.run(job.job_id).succeed()
    first.set_up(True)
    done = await core.until_state(job.job_id, JobState.SUCCEEDED)
    assert done.attempt == 1
    assert second.start_calls == []


@pytest.mark.parametrize("has_copy", [True, False])
async def test_a_node_that_lost_its_disk_gets_the_checkpoint_from_control_or_begins_anew(
    open_core: OpenCore, has_copy: bool
) -> None:
    node = FakeNode("a")
    core = await open_core(node, config=quick_config(None if has_copy else _NO_COPIES))
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    file = node.run(job.job_id).checkpoint(20)
    await core.until_job(job.job_id, lambda j: j.run_cursor == len(node.run(job.job_id).events))
    if has_copy:
        await until(lambda: file.sha256 in core.blobs.blobs)
    node.blobs.clear()
    node.runs.clear()
    node.changed()
    again = await core.until_job(job.job_id, lambda j: j.is_over or (j.attempt == 2 and j.state is JobState.RUNNING))
    assert again.state is JobState.RUNNING
    resume = node.run(job.job_id, 2).request.resume_from
    if has_copy:
        assert resume is not None
        assert (resume.step, [known.sha256 for known in resume.files]) == (20, [file.sha256])
    else:
        assert resume is None
        told = [fact.status for fact in await core.facts(job.job_id) if isinstance(fact, CheckpointFact)]
        assert told == [CheckpointStatus.COMMITTED, CheckpointStatus.DELETED]


@pytest.mark.parametrize("has_copy", [True, False])
async def test_a_damaged_checkpoint_is_forgotten_and_the_next_best_gone_on_from(
    open_core: OpenCore, has_copy: bool
) -> None:
    core, node, job_id, file = await _behind_two_checkpoints(open_core, has_copy=has_copy)
    first = node.run(job_id)
    first.fail("ENGINE_KILLED", Fault.HARDWARE)
    await core.until_job(job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)

    node.run(job_id, 2).fail("RESUME_MISMATCH", Fault.HARDWARE, checkpoint="step-00000040")

    again = await core.until_job(job_id, lambda j: j.is_over or (j.attempt == 3 and j.state is JobState.RUNNING))
    assert again.state is JobState.RUNNING
    resume = node.run(job_id, 3).request.resume_from
    assert resume is not None
    assert resume.step == (40 if has_copy else 20)
    assert [known.sha256 for known in resume.files] == ([file.sha256] if has_copy else [])


@pytest.mark.parametrize("has_copy", [True, False])
async def test_a_node_that_finds_its_checkpoint_damaged_is_given_the_next_best_and_the_log_says_so(
    open_core: OpenCore, has_copy: bool
) -> None:
    core, node, job_id, _ = await _behind_two_checkpoints(open_core, has_copy=has_copy)
    first = node.run(job_id)
    node.damaged_checkpoints.add("step-00000040")
    first.fail("ENGINE_KILLED", Fault.HARDWARE)

    again = await core.until_job(job_id, lambda j: j.is_over or (j.attempt == 2 and j.state is JobState.RUNNING))

    # The same attempt: it costs no retry that the node looked first.
    assert (again.state, again.num_retries) == (JobState.RUNNING, 1)
    resume = node.run(job_id, 2).request.resume_from
    assert resume is not None
    assert (resume.step, len(resume.files)) == ((40, 1) if has_copy else (20, 0))
    (warning,) = [fact for fact in await core.facts(job_id) if isinstance(fact, WarningFact)]
    assert warning.code == "checkpoint-damaged"
    assert "step-00000040" in warning.message


async def test_the_only_checkpoint_is_damaged(open_core: OpenCore) -> None:
    """Training begins anew, and the log says so."""
    core, node, job_id = await _gone_on_from_its_checkpoint(open_core)
    node.run(job_id, 2).fail("RESUME_MISMATCH", Fault.HARDWARE, checkpoint="step-00000020")
    await core.until_job(job_id, lambda j: j.attempt == 3 and j.state is JobState.RUNNING)

    assert node.run(job_id, 3).request.resume_from is None
    facts = await core.facts(job_id)
    assert [fact.status for fact in facts if isinstance(fact, CheckpointFact)][-1] is CheckpointStatus.DELETED
    assert [fact.code for fact in facts if isinstance(fact, WarningFact)] == ["no-checkpoint-left"]


async def test_what_a_checkpoint_certifies_does_not_hold(open_core: OpenCore) -> None:
    """Not tried again: it would differ again. The job fails with both values, and nothing is forgotten."""
    core, node, job_id = await _gone_on_from_its_checkpoint(open_core)
    details = {"checkpoint": "step-00000020", "what": "probe_loss", "saved": "2.5", "measured": "3.5"}
    node.run(job_id, 2).fail("RESUME_MISMATCH", Fault.PLATFORM, **details)

    failed = await core.until_state(job_id, JobState.FAILED)
    assert failed.attempt == 2
    assert failed.failure is not None
    assert (failed.failure.reason, failed.failure.details) == ("RESUME_MISMATCH", details)


async def test_a_paused_job_goes_on_on_another_node(open_core: OpenCore) -> None:
    first, second = FakeNode("a"), FakeNode("b")
    config = quick_config()
    core = await open_core(first, second, config=replace(config, nodes=replace(config.nodes, lease_seconds=0.3)))
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    assert (await core.running(job.job_id)).node == "a"
    await core.pause(job.job_id)
    await core.until_state(job.job_id, JobState.PAUSED)
    (saved,) = [fact for fact in await core.facts(job.job_id) if isinstance(fact, CheckpointFact) and fact.files][:1]
    first.set_up(False)
    await until(lambda: all(view.is_reachable is (view.node.name == "b") for view in core.runtime.nodes.views()))

    await core.resume(job.job_id)

    resumed = await core.until_job(job.job_id, lambda j: j.state is JobState.RUNNING)
    assert (resumed.node, resumed.attempt) == ("b", 2)
    resume = second.run(job.job_id, 2).request.resume_from
    assert resume is not None
    assert (resume.step, resume.files) == (saved.step, saved.files)
    assert {file.sha256 for file in saved.files} <= second.blobs.keys()


async def test_a_checkpoint_that_came_while_another_was_copied_is_copied_next(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job_id = (await core.start((await core.project()).project_id)).job_id
    await core.running(job_id)
    node.read_gate = asyncio.Event()
    for step in (10, 20):
        node.run(job_id).checkpoint(step)
        cursor = len(node.run(job_id).events)
        await core.until_job(job_id, lambda job, cursor=cursor: job.run_cursor >= cursor)  # type: ignore[misc]
    node.read_gate.set()

    async def replicated() -> list[int]:
        found = await list_checkpoints(job_id, store=core.store)
        return [checkpoint.step for checkpoint in found if checkpoint.status is CheckpointStatus.REPLICATED]

    async with asyncio.timeout(30):
        while await replicated() != [20]:  # noqa: ASYNC110 - nothing tells a test of it
            await asyncio.sleep(0.01)
