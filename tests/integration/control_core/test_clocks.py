"""The time of day is set wrong while jobs wait and run: nothing is decided by it."""

from __future__ import annotations

import time
from datetime import datetime, timedelta

import pytest

from control_service.adapters.clock import SystemClock
from control_service.app.lookups import newest_job_id
from control_service.domain.ids import UlidSource
from control_service.domain.job_state import JobState
from tests.fakes.control_node import FakeNode
from tests.integration.control_core.conftest import OpenCore

_BACK_OFF_SECONDS = 1.0


class JumpingClock(SystemClock):
    """The machine's clocks, with a time of day that somebody sets."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = timedelta(0)

    def utc_now(self) -> datetime:
        return super().utc_now() + self.offset


@pytest.mark.parametrize("hours", [1, -1])
async def test_a_clock_that_is_set_neither_shortens_nor_lengthens_a_back_off(open_core: OpenCore, hours: int) -> None:
    clock, node = JumpingClock(), FakeNode("a")
    core = await open_core(node, clock=clock)
    await core.reachable()
    job_id = (await core.start((await core.project()).project_id)).job_id
    await core.running(job_id)
    failed_at = time.monotonic()
    node.run(job_id).fail("ENGINE_KILLED")
    await core.until_state(job_id, JobState.QUEUED)
    clock.offset = timedelta(hours=hours)
    job = await core.until_job(job_id, lambda job: job.attempt == 2 and job.state is JobState.RUNNING)
    assert time.monotonic() - failed_at >= _BACK_OFF_SECONDS
    node.run(job_id, 2).succeed()
    job = await core.until_state(job_id, JobState.SUCCEEDED)
    assert job.start_time is not None
    assert job.end_time is not None
    assert job.create_time <= job.start_time <= job.end_time


async def test_jobs_are_served_in_their_order_though_the_clock_was_set_back_over_a_restart(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    blocking = await core.start(project.project_id)
    await core.running(blocking.job_id)
    first = await core.start(project.project_id)
    await core.restart()
    await core.reachable()
    milliseconds = (time.time_ns() // 1_000_000) - 3_600_000
    core.ids = UlidSource(lambda: milliseconds, newest=await newest_job_id(core.store))
    second = await core.start(project.project_id)
    assert first.job_id < second.job_id
    assert (await core.view(first.job_id)).queue_position == 1
