"""A job's newest checkpoint is copied while its run goes on, and what could not be copied is tried again."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from control_service.app.replication import Replication
from control_service.domain.job import Job
from tests.fakes.control_clock import FakeClock
from tests.fakes.control_jobs import make_job

_JOB = make_job()
_NODE = cast(Any, object())


class _Replicator:
    """Finds no room as often as it is told."""

    def __init__(self) -> None:
        self.num_refusals = 0
        self.num_asked = 0
        self.copied = asyncio.Event()

    async def replicate_newest(self, job: Job, client: object) -> bool:
        self.num_asked += 1
        if self.num_refusals:
            self.num_refusals -= 1
            return False
        self.copied.set()
        return True


async def test_a_job_that_stays_after_all_has_its_next_checkpoint_copied() -> None:
    replicator, clock = _Replicator(), FakeClock()
    replication = Replication(cast(Any, replicator), clock)
    # It was to leave its node; then it did not.
    await replication.settle()
    replicator.num_refusals = 1
    replication.want(_JOB, _NODE)
    await clock.pass_time(60)
    assert replicator.copied.is_set()
    assert replicator.num_asked == 2
    await replication.stop()


async def test_a_job_that_leaves_does_not_wait_for_room() -> None:
    replicator = _Replicator()
    replicator.num_refusals = 1_000_000
    replication = Replication(cast(Any, replicator), FakeClock())
    replication.want(_JOB, _NODE)
    async with asyncio.timeout(30):
        await replication.settle()
    assert not replicator.copied.is_set()
    await replication.stop()
