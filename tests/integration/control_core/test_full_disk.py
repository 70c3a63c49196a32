"""Control between full disks: a job waits for room, on a node or for its artifacts, and goes on by itself."""

from __future__ import annotations

import sqlite3

import pytest
import sqlalchemy as sa

from control_service.adapters.sql.refusals import unavailable
from control_service.app import inference
from control_service.domain.artifact import CheckpointStatus
from control_service.domain.errors import ResourceExhausted, StoreFull, Unavailable
from control_service.domain.event import JobStateFact, WarningFact
from control_service.domain.generation import ChatMessage, GenerationSource
from control_service.domain.job_state import JobState
from control_service.domain.run import RunState
from tests.fakes.control_core import Core, until
from tests.fakes.control_node import FakeNode

from .conftest import OpenCore


async def _warnings(core: Core, job_id: str) -> list[str]:
    facts = [core.codec.decode(event.kind, event.payload) for event in await core.log(job_id)]
    return [fact.code for fact in facts if isinstance(fact, WarningFact)]


async def test_artifacts_wait_for_room_and_the_job_says_so_once(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    core.blobs.is_full = True
    node.run(job.job_id).succeed(b"adapter")
    while not await _warnings(core, job.job_id):
        await core.clock.sleep(0.01)
    # Tried a few times more.
    await core.clock.sleep(0.2)
    assert await _warnings(core, job.job_id) == ["collecting-waits-for-room"]
    waiting = await core.until_job(job.job_id, lambda _: True)
    assert (waiting.state, waiting.run_state) == (JobState.RUNNING, RunState.SUCCEEDED)
    assert node.released == []
    core.blobs.is_full = False
    done = await core.until_state(job.job_id, JobState.SUCCEEDED)
    assert (done.attempt, done.num_retries) == (1, 0)


async def test_a_job_whose_artifacts_wait_for_room_can_be_cancelled(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    core.blobs.is_full = True
    node.run(job.job_id).succeed(b"adapter")
    while not await _warnings(core, job.job_id):
        await core.clock.sleep(0.01)
    await core.cancel(job.job_id)
    over = await core.until_state(job.job_id, JobState.CANCELLED)
    assert over.run_state is RunState.SUCCEEDED
    # Nobody wants it any more; the node gets its room back.
    await until(lambda: len(node.released) == 1)


async def test_a_checkpoint_that_control_has_no_room_for_is_said_once_and_copied_when_there_is_room(
    open_core: OpenCore,
) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    core.blobs.is_full = True
    node.run(job.job_id).checkpoint(1)
    while not await _warnings(core, job.job_id):
        await core.clock.sleep(0.01)
    assert await _warnings(core, job.job_id) == ["checkpoint-not-replicated"]

    async def is_replicated() -> bool:
        kept = await core.store.read(lambda tx: tx.checkpoints.list_for_job(job.job_id))
        return [checkpoint.status for checkpoint in kept] == [CheckpointStatus.REPLICATED]

    assert not await is_replicated()
    # No later checkpoint comes.
    core.blobs.is_full = False
    while not await is_replicated():
        await core.clock.sleep(0.05)
    assert await _warnings(core, job.job_id) == ["checkpoint-not-replicated"]


async def test_a_job_leaves_its_node_although_control_has_no_room_for_its_checkpoint(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    core.blobs.is_full = True
    node.run(job.job_id).checkpoint(1)
    while not await _warnings(core, job.job_id):
        await core.clock.sleep(0.01)
    await core.pause(job.job_id)
    await core.until_state(job.job_id, JobState.PAUSED)


async def test_a_node_without_room_takes_the_job_when_it_has_some(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    node.start_error = ResourceExhausted("DISK_FULL", "9 bytes are needed, 1 free", retry_after_seconds=0.05)
    job = await core.start(project.project_id, max_retries=0)

    async def refused() -> bool:
        facts = [core.codec.decode(event.kind, event.payload) for event in await core.log(job.job_id)]
        said = [fact.message for fact in facts if isinstance(fact, JobStateFact)]
        return "node a: DISK_FULL: 9 bytes are needed, 1 free" in said

    while not await refused():
        await core.clock.sleep(0.01)
    node.start_error = None
    running = await core.running(job.job_id)
    assert running.num_retries == 0


async def test_a_run_that_found_no_room_for_its_artifacts_is_tried_again(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    node.run(job.job_id).fail("DISK_FULL")
    again = await core.until_job(job.job_id, lambda j: j.attempt == 2)
    assert again.num_retries == 1


async def test_the_next_node_is_asked_when_one_has_no_room_for_the_adapter(open_core: OpenCore) -> None:
    nodes = FakeNode("a"), FakeNode("b")
    core = await open_core(*nodes)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    (trained,) = [node for node in nodes if node.runs]
    trained.run(job.job_id).succeed(b"adapter")
    await core.until_state(job.job_id, JobState.SUCCEEDED)
    for node in nodes:
        node.blobs.clear()
    nodes[0].is_full = True

    def ask() -> object:
        return inference.generate(
            GenerationSource(job_id=job.job_id),
            [ChatMessage(role="user", content="?")],
            {},
            store=core.store,
            nodes=core.runtime.nodes,
            blobs=core.blobs,
        )

    assert {answering.node async for answering, _ in ask()} == {"b"}  # type: ignore[attr-defined]
    nodes[1].is_full = True
    nodes[1].blobs.clear()
    with pytest.raises(ResourceExhausted, match="DISK_FULL"):
        assert [part async for part in ask()]  # type: ignore[attr-defined]


async def test_a_full_database_is_told_from_one_that_does_not_answer() -> None:
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    error = unavailable(sa.exc.OperationalError("INSERT", {}, full))
    assert isinstance(error, StoreFull)
    assert error.reason == "DISK_FULL"
    locked = unavailable(sa.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("locked")))
    assert (type(locked), locked.reason) == (Unavailable, "STORE_UNAVAILABLE")
