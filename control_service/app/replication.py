"""Keeps one job's newest checkpoint copied while its run goes on. Copies nothing itself; that is the replicator's."""

from __future__ import annotations

import asyncio
from typing import Final

from control_service.app.back_off import BackOff, BackOffConfig
from control_service.app.ports import Clock, NodeClient
from control_service.app.replicator import Replicator
from control_service.app.tasks import end
from control_service.domain.job import Job

_AGAIN: Final = BackOffConfig(initial_seconds=1.0, max_seconds=10.0)


class Replication:
    """Of one attempt at a time; made in a running event loop."""

    def __init__(self, replicator: Replicator, clock: Clock, *, again: BackOffConfig = _AGAIN) -> None:
        self._replicator = replicator
        self._clock = clock
        self._again = again
        # The job as it was when it had a checkpoint that nobody has begun to copy.
        self._wanted: Job | None = None
        self._task: asyncio.Task[None] | None = None
        # The job is about to leave its node: what cannot be copied now is not waited for.
        self._leaves = asyncio.Event()

    def want(self, job: Job, client: NodeClient) -> None:
        """The job has a new checkpoint."""
        self._wanted = job
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(client), name=f"replicate-{job.job_id}")

    async def settle(self) -> None:
        """Waits for the copy that is being made; what there was no room for is given up. A job that stays after all
        has its next checkpoint copied as before."""
        self._leaves.set()
        try:
            if self._task is not None:
                await asyncio.wait({self._task})
        finally:
            self._leaves.clear()

    async def stop(self) -> None:
        """Ends it, and is ready for another attempt."""
        if self._task is not None:
            await end(self._task)
        self._task = self._wanted = None

    async def _run(self, client: NodeClient) -> None:
        """Also what was committed while an earlier checkpoint was being copied, and what could not be copied at first:
        no later one may come for long."""
        pauses = BackOff(self._again)
        while (job := self._wanted) is not None:
            self._wanted = None
            if await self._replicator.replicate_newest(job, client):
                pauses.reset()
            elif self._leaves.is_set():
                return
            else:
                self._wanted = self._wanted or job
                await self._pause(pauses.next_seconds())

    async def _pause(self, seconds: float) -> None:
        sleeping = asyncio.create_task(self._clock.sleep(seconds))
        leaving = asyncio.create_task(self._leaves.wait())
        try:
            await asyncio.wait({sleeping, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            leaving.cancel()
