"""Watching a job: history, tail, resume, shared pages, heartbeats, the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest

from control_service.app.event_hub import EventHub, EventHubConfig
from control_service.app.pacing import PacerConfig
from control_service.app.store_ports import CommitNotice, Store, Transaction
from control_service.domain.errors import NotFound, OutOfRange, Unavailable
from control_service.domain.event import StoredEvent, WarningFact
from control_service.domain.job_state import JobState
from tests.fakes.control_codec import page_of
from tests.fakes.control_core import Core, quick_config, until
from tests.fakes.control_node import FakeNode, FakeRun
from tests.integration.control_core.conftest import OpenCore

T = TypeVar("T")
PATIENCE_SECONDS = 15.0


class CountedReads:
    """A store that counts what is read from it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.num_reads = 0

    @property
    def installation_id(self) -> str:
        return self._store.installation_id

    async def transact(self, work: Callable[[Transaction], T]) -> T:
        return await self._store.transact(work)

    async def read(self, work: Callable[[Transaction], T]) -> T:
        self.num_reads += 1
        return await self._store.read(work)

    def subscribe(self, listener: Callable[[CommitNotice], None]) -> None:
        self._store.subscribe(listener)


async def _watched(hub: EventHub, job_id: str) -> list[StoredEvent]:
    """Everything that a watcher is given until the watch ends by itself."""
    events: list[StoredEvent] = []
    async for message in hub.watch(job_id):
        events += page_of(message)
    return events


async def _running(open_core: OpenCore) -> tuple[Core, str, FakeRun]:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    return core, job.job_id, node.run(job.job_id)


async def test_a_watcher_gets_history_then_tail_once_and_in_order(open_core: OpenCore) -> None:
    core, job_id, run = await _running(open_core)
    for step in range(1, 20):
        run.step(step)
    early = asyncio.create_task(core.watch(job_id))
    late = asyncio.create_task(core.watch(job_id, after=5))
    await until(lambda: core.runtime.hub.num_watchers == 2)
    for step in range(20, 40):
        run.step(step)
    run.succeed()
    events = await early
    log = await core.log(job_id)
    assert events == log
    assert await late == log[5:]
    # And after the end: everything at once, from anywhere.
    assert await core.watch(job_id, after=len(log) - 1) == log[-1:]
    assert await core.watch(job_id, after=len(log)) == []


async def test_watchers_share_encoded_pages(open_core: OpenCore) -> None:
    core, job_id, run = await _running(open_core)
    for step in range(1, 60):
        run.step(step)
    run.succeed()
    await core.until_state(job_id, JobState.SUCCEEDED)
    first = await core.watch(job_id)
    encoded = core.codec.num_pages
    assert all(events == first for events in await asyncio.gather(*(core.watch(job_id) for _ in range(20))))
    assert core.codec.num_pages == encoded


async def test_pages_that_were_cut_because_an_event_is_large_are_shared(open_core: OpenCore) -> None:
    core, job_id, run = await _running(open_core)
    for step in range(1, 4):
        run.step(step)
        run.emit(WarningFact(code="large", message="x" * 4096))
    run.succeed()
    await core.until_state(job_id, JobState.SUCCEEDED)
    hub = EventHub(store=core.store, codec=core.codec, config=EventHubConfig(max_page_bytes=4096))
    assert await _watched(hub, job_id) == (log := await core.log(job_id))
    read = hub.num_pages_read
    assert read > 3
    assert await _watched(hub, job_id) == log
    assert hub.num_pages_read == read


async def test_a_page_of_the_end_that_was_cut_is_shared_when_the_log_has_grown(open_core: OpenCore) -> None:
    core, job_id, run = await _running(open_core)
    config = EventHubConfig(max_page_bytes=4096)
    hub = EventHub(store=core.store, codec=core.codec, config=config)
    watcher = asyncio.create_task(_watched(hub, job_id))
    await until(lambda: hub.num_watchers == 1)
    for step in range(1, 20):
        run.step(step)
        run.emit(WarningFact(code="large", message="x" * 4096))
    run.succeed()
    seen = await watcher
    read = hub.num_pages_read
    assert await _watched(hub, job_id) == seen == await core.log(job_id)
    # The first page of history, from where no watcher was when it was written, may have to be read.
    assert hub.num_pages_read <= read + 2


async def test_many_small_pages_do_not_outgrow_the_cache(open_core: OpenCore) -> None:
    node = FakeNode("a")
    config = quick_config()
    events = replace(config.events, cache_bytes=8 * 1024)
    core = await open_core(node, config=replace(config, events=events))
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    for step in range(1, 60):
        run.step(step)
    run.succeed()
    await core.until_state(job.job_id, JobState.SUCCEEDED)
    for after in range(60):
        await core.watch(job.job_id, after=after)
    assert 0 < core.runtime.hub.num_cached_pages <= 16


async def test_a_watcher_that_reads_nothing_holds_up_nobody(open_core: OpenCore) -> None:
    core, job_id, run = await _running(open_core)
    stalled = core.runtime.hub.watch(job_id)
    assert page_of(await anext(aiter(stalled)))
    for step in range(1, 40):
        run.step(step)
    run.succeed()
    assert await core.watch(job_id) == await core.log(job_id)


async def test_a_crowd_costs_the_store_and_the_loop_little(open_core: OpenCore) -> None:
    core, job_id, run = await _running(open_core)
    reads = CountedReads(core.store)
    hub = EventHub(
        store=reads,
        codec=core.codec,
        config=EventHubConfig(
            heartbeat_seconds=30.0, max_page_events=8, pace=PacerConfig(crowd_woken_per_second=20_000.0)
        ),
    )
    watchers = [asyncio.create_task(_watched(hub, job_id)) for _ in range(200)]
    await until(lambda: reads.num_reads - hub.num_pages_read >= 200)
    looks, pages = reads.num_reads - hub.num_pages_read, hub.num_pages_read
    for step in range(1, 41):
        run.step(step)
        await core.until_job(job_id, lambda j: j.run_cursor == len(run.events))
    run.succeed()
    seen = await asyncio.gather(*watchers)
    log = await core.log(job_id)
    assert all(events == log for events in seen)
    # One look for all, and only where a commit may have ended the job; woken together, they share their pages.
    assert reads.num_reads - hub.num_pages_read - looks < 20
    assert hub.num_pages_read - pages < 400


async def test_a_few_watchers_wait_for_no_turn(open_core: OpenCore) -> None:
    core, job_id, run = await _running(open_core)
    # At this pace a crowd of so many would be woken once in hours.
    config = EventHubConfig(heartbeat_seconds=3600.0, pace=PacerConfig(crowd_woken_per_second=0.01))
    hub = EventHub(store=core.store, codec=core.codec, config=config)
    watchers = [asyncio.create_task(_watched(hub, job_id)) for _ in range(config.pace.num_unpaced)]
    await until(lambda: hub.num_watchers == config.pace.num_unpaced)
    for step in range(1, 41):
        run.step(step)
        await core.until_job(job_id, lambda j: j.run_cursor == len(run.events))
    run.succeed()
    async with asyncio.timeout(PATIENCE_SECONDS):
        seen = await asyncio.gather(*watchers)
    log = await core.log(job_id)
    assert all(events == log for events in seen)


async def test_a_quiet_watch_sends_heartbeats_with_its_position(open_core: OpenCore) -> None:
    import pickle

    core, job_id, run = await _running(open_core)
    await core.until_job(job_id, lambda j: j.run_cursor == len(run.events))
    last = (await core.log(job_id))[-1].sequence
    async for message in core.runtime.hub.watch(job_id, after_sequence=last):
        assert pickle.loads(message) == last
        break


async def test_draining_ends_watches_with_a_reason(open_core: OpenCore) -> None:
    core, job_id, _ = await _running(open_core)
    watch = asyncio.create_task(core.watch(job_id))
    await until(lambda: core.runtime.hub.num_watchers == 1)
    core.runtime.drain()
    with pytest.raises(Unavailable, match="SHUTTING_DOWN"):
        await watch


async def test_positions_that_cannot_be_read_are_refused(open_core: OpenCore) -> None:
    core, job_id, _ = await _running(open_core)
    with pytest.raises(OutOfRange) as refused:
        await core.watch(job_id, after=10_000)
    assert refused.value.reason == "SEQUENCE_IN_FUTURE"
    with pytest.raises(NotFound, match="JOB_NOT_FOUND"):
        await core.watch("01J00000000000000000000000")
    assert core.runtime.hub.num_watchers == 0
