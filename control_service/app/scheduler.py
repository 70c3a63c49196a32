"""Gives queued jobs to nodes. Woken by commits and by nodes, never by a timer but the end of a back-off.

It only chooses: (job, node) by the queue policy, stored as DISPATCHING with the next attempt before anybody calls out.
The supervisor does the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from datetime import datetime
from functools import partial

import structlog

from control_service.app.back_off import BackOffConfig
from control_service.app.node_monitor import NodeMonitor
from control_service.app.ports import Clock, EventCodec
from control_service.app.queue import JobQueue, decide_again
from control_service.app.store_ports import CommitNotice, Store, Transaction
from control_service.app.tasks import TaskSet
from control_service.app.transitions import change_state
from control_service.domain.failpoints import failpoint
from control_service.domain.job_state import JobState
from control_service.domain.node import NodeView
from control_service.domain.run import Phase

_log = structlog.get_logger(__name__)


class Scheduler:
    """Started once."""

    def __init__(
        self,
        *,
        store: Store,
        nodes: NodeMonitor,
        queue: JobQueue,
        codec: EventCodec,
        clock: Clock,
        back_off: BackOffConfig,
    ) -> None:
        self._back_off = back_off
        self._queue = queue
        self._store = store
        self._nodes = nodes
        self._codec = codec
        self._clock = clock
        self._wake = asyncio.Event()
        self._draining = False
        self._tasks = TaskSet()
        store.subscribe(self._on_commit)
        nodes.subscribe(lambda _: self._wake.set())

    def start(self) -> None:
        """Looks at the queue, now and whenever woken."""
        self._tasks.keep("scheduler", self._run, clock=self._clock, back_off=self._back_off)

    def drain(self) -> None:
        """Dispatches nothing more."""
        self._draining = True

    async def stop(self) -> None:
        """Ends the task."""
        await self._tasks.stop_all()

    def _on_commit(self, notice: CommitNotice) -> None:
        if notice.moved_jobs or notice.nodes_changed:
            self._wake.set()

    async def _run(self) -> None:
        # Also when it begins again after an error: what woke it then was not seen to.
        self._wake.set()
        while not self._draining:
            await self._wake.wait()
            self._wake.clear()
            choice = await self._queue.choose()
            chosen = [job_id for job_id, _ in choice.assignments]
            if chosen and not self._draining:
                await self._store.transact(partial(self._assign, chosen))
                failpoint("dispatch.after-commit")
            await self._wake_at(choice.next_time)

    async def _wake_at(self, time: datetime | None) -> None:
        await self._tasks.stop("scheduler-back-off")
        if time is None:
            return

        async def wake() -> None:
            seconds = (time - self._clock.steady_utc_now()).total_seconds()
            await self._clock.sleep(max(0.0, seconds) + 0.001)
            self._wake.set()

        self._tasks.start("scheduler-back-off", wake)

    def _assign(self, job_ids: Collection[str], tx: Transaction) -> None:
        # Decided again inside the transaction: what was read before it may be old.
        now = self._clock.utc_now()
        views: Sequence[NodeView] = self._nodes.views()
        by_name = {view.node.name: view for view in views}
        for job_id, node in decide_again(tx, job_ids, views, self._clock.steady_utc_now()):
            job = tx.jobs.get(job_id)
            if job is None:
                continue
            if job.state is not JobState.QUEUED:
                message = f"node {job.node} is lost; goes on elsewhere"
                job = change_state(tx, job, JobState.QUEUED, codec=self._codec, now=now, message=message)
            model = by_name[node].model(job.spec.base_model)
            job = change_state(
                tx,
                job,
                JobState.DISPATCHING,
                codec=self._codec,
                now=now,
                keep_failure=True,
                attempt=max(job.attempt, self._nodes.highest_attempt(job_id)) + 1,
                node=node,
                phase=Phase.UNSPECIFIED,
                run_cursor=0,
                run_state=None,
                not_before=None,
                weights_digest=job.weights_digest or (model.weights_digest if model else ""),
            )
            _log.info("job-dispatching", job_id=job_id, attempt=job.attempt, node=node)
