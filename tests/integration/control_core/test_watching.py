"""Watching a job: history, tail, resume, shared pages, heartbeats, the end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from control_service.domain.errors import NotFound, OutOfRange, Unavailable
from control_service.domain.job_state import JobState
from tests.fakes.control_codec import page_of
from tests.fakes.control_core import Core, quick_config, until
from tests.fakes.control_node import FakeNode, FakeRun
from tests.integration.control_core.conftest import OpenCore


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
    node = FakeNode("a")
    config = quick_config()
    events = replace(config.events, max_woken_per_second=20_000.0, heartbeat_seconds=30.0)
    core = await open_core(node, config=replace(config, events=events))
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    watchers = [asyncio.create_task(core.watch(job.job_id)) for _ in range(200)]
    await until(lambda: core.runtime.hub.num_watchers == 200)
    looks, pages = 0, core.runtime.hub.num_pages_read
    look = core.runtime.hub._look

    async def counted(*arguments: Any) -> None:
        nonlocal looks
        looks += 1
        await look(*arguments)

    core.runtime.hub._look = counted  # type: ignore[method-assign, assignment]
    for step in range(1, 41):
        run.step(step)
        await core.until_job(job.job_id, lambda j: j.run_cursor == len(run.events))
    run.succeed()
    seen = await asyncio.gather(*watchers)
    log = await core.log(job.job_id)
    assert all(events == log for events in seen)
    # One look for all, and only where a commit may have ended the job; woken together, they share their pages.
    assert looks < 20
    assert core.runtime.hub.num_pages_read - pages < 400


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
