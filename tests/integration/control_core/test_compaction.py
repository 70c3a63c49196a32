"""Compacting the logs of jobs that are long over, under watchers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from control_service.app import jobs
from control_service.app.runtime import RetentionConfig
from control_service.domain.errors import OutOfRange
from control_service.domain.event import JobStateFact
from control_service.domain.job_state import JobState
from tests.fakes.control_codec import page_of
from tests.fakes.control_core import Core, quick_config
from tests.fakes.control_node import FakeNode
from tests.integration.control_core.conftest import OpenCore

RETENTION = timedelta(days=3)


async def _ended(core: Core, node: FakeNode, *, name: str, num_steps: int) -> str:
    job = await core.start((await core.project(name)).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    for step in range(1, num_steps + 1):
        run.step(step)
    run.succeed()
    await core.until_state(job.job_id, JobState.SUCCEEDED)
    return job.job_id


async def _bounds(core: Core, job_id: str) -> tuple[int, int]:
    return await core.store.read(lambda tx: tx.events.bounds(job_id))


async def _open(open_core: OpenCore, node: FakeNode, retention: timedelta) -> Core:
    config = quick_config(RetentionConfig(events=retention))
    core = await open_core(node, config=config)
    await core.reachable()
    return core


async def test_a_log_that_is_old_enough_keeps_its_last_event_only(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await _open(open_core, node, timedelta(0))
    job_id = await _ended(core, node, name="old", num_steps=30)
    newest = (await _bounds(core, job_id))[1]
    assert (await _bounds(core, job_id))[0] == 1
    # The job ended just now: a retention of microseconds is over as soon as control starts again.
    core.config = replace(core.config, retention=RetentionConfig(events=timedelta(microseconds=1)))
    await core.restart()
    async with asyncio.timeout(30):
        while await _bounds(core, job_id) != (newest, newest):  # noqa: ASYNC110 - nothing tells a test of it
            await asyncio.sleep(0.005)
    for after in (0, newest - 2):
        with pytest.raises(OutOfRange) as caught:
            await core.watch(job_id, after=after)
        assert (caught.value.reason, caught.value.details) == ("HISTORY_COMPACTED", {"oldest_sequence": str(newest)})
    with pytest.raises(OutOfRange):
        await jobs.list_job_events(job_id, store=core.store)
    (last,) = await core.watch(job_id, after=newest - 1)
    fact = core.codec.decode(last.kind, last.payload)
    assert isinstance(fact, JobStateFact)
    assert fact.state is JobState.SUCCEEDED
    # What the job is and left stays.
    assert (await core.view(job_id)).job.state is JobState.SUCCEEDED


async def test_a_young_log_and_a_live_one_stay_whole(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await _open(open_core, node, RETENTION)
    job_id = await _ended(core, node, name="young", num_steps=5)
    live = await core.start((await core.project("live")).project_id)
    await core.running(live.job_id)
    found = await core.store.read(lambda tx: tx.jobs.find_compactable(ended_before=core.clock.utc_now() - RETENTION))
    assert found is None
    later = core.clock.utc_now() + RETENTION
    found = await core.store.read(lambda tx: tx.jobs.find_compactable(ended_before=later))
    assert found is not None
    assert found.job_id == job_id


async def test_a_watcher_in_the_middle_of_history_is_told_and_gets_no_gap(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await _open(open_core, node, timedelta(0))
    job_id = await _ended(core, node, name="watched", num_steps=60)
    newest = (await _bounds(core, job_id))[1]
    watch = core.runtime.hub.watch(job_id)
    first = page_of(await anext(aiter(watch)))
    assert [event.sequence for event in first] == list(range(1, len(first) + 1))
    assert len(first) < newest - 1
    # Two rounds, as the compactor would: the log stays without a gap between them.
    end = newest - 3
    assert await core.store.transact(lambda tx: tx.events.compact(job_id, before_sequence=end, limit=10)) == 10
    assert await _bounds(core, job_id) == (11, newest)
    assert await core.store.transact(lambda tx: tx.events.compact(job_id, before_sequence=end, limit=1000)) == end - 11
    seen = list(first)

    async def go_on() -> None:
        async for message in watch:
            seen.extend(page_of(message))

    with pytest.raises(OutOfRange) as caught:
        await go_on()
    assert caught.value.details == {"oldest_sequence": str(end)}
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
