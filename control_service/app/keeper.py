"""Keeps one live job: looks at it and at its node, asks `reconcile` what to do, does it, and waits until something
changed. Every start of control begins in the same loop; there is nothing else to recover with."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import structlog

from control_service.app.attempts import AttemptStarter
from control_service.app.back_off import BackOff, BackOffConfig
from control_service.app.collector import Collector
from control_service.app.gathering import gathered
from control_service.app.ingest import ingest
from control_service.app.node_monitor import NodeMonitor
from control_service.app.placing import send_elsewhere
from control_service.app.ports import Clock, EventCodec, NodeClient
from control_service.app.replication import Replication
from control_service.app.replicator import Replicator
from control_service.app.settle import Settler
from control_service.app.store_ports import Store, Transaction
from control_service.app.tasks import end
from control_service.app.transitions import append_facts
from control_service.domain.errors import TunesmithError
from control_service.domain.event import NodeReachabilityFact
from control_service.domain.failpoints import failpoint
from control_service.domain.job import Job
from control_service.domain.job_state import ON_NODE, JobState
from control_service.domain.node import NodeState
from control_service.domain.reconcile import Activity, NodeSight, Observation, Settle, reconcile
from control_service.domain.run import RUN_OVER, ObservedRun, RunState, StopMode

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class KeeperPorts:
    """What every keeper uses."""

    store: Store
    nodes: NodeMonitor
    codec: EventCodec
    clock: Clock
    starter: AttemptStarter
    collector: Collector
    settler: Settler
    replicator: Replicator
    back_off: BackOffConfig


class JobKeeper:
    """One job; `run` ends when the job is not on a node any more."""

    def __init__(self, job_id: str, ports: KeeperPorts) -> None:
        self._job_id = job_id
        self._ports = ports
        self._wake = asyncio.Event()
        self._back_off = BackOff(ports.back_off)
        self._attempt = 0
        self._doing = Activity.NONE
        self._activity: asyncio.Task[None] | None = None
        self._replication = Replication(ports.replicator, ports.clock)
        self._seen_run: ObservedRun | None = None
        self._agreed_stop: StopMode | None = None
        # The run's events were followed to the end of the run.
        self._heard_all = False
        self._log = _log.bind(job_id=job_id)
        self.node = ""

    def wake(self) -> None:
        """Something about the job or its node may have changed."""
        self._wake.set()

    async def run(self) -> None:
        """Keeps the job until it rests or is over."""
        try:
            while True:
                self._wake.clear()
                job = await self._ports.store.read(lambda tx: tx.jobs.get(self._job_id))
                if job is None or job.state not in ON_NODE:
                    return
                await self._turn(job)
        finally:
            await self._end_activity()
            await self._replication.stop()

    async def _turn(self, job: Job) -> None:
        if job.attempt != self._attempt:
            await self._end_activity()
            self._attempt, self.node = job.attempt, job.node
            self._agreed_stop = self._seen_run = None
            await self._replication.stop()
            self._heard_all = False
            self._log = _log.bind(job_id=job.job_id, attempt=job.attempt, node=job.node)
        if self._is_active() and not _fits(self._doing, job):
            await self._end_activity()
        if self._is_active() and self._doing is not Activity.FOLLOW:
            await self._wait()
            return
        seen = await self._observe(job)
        if self._heard_all and seen.run is not None and seen.run.is_over:
            await self._take_outcome(job, seen.run)
            return
        decision = reconcile(job, seen)
        if decision.mark_unreachable is not None:
            await self._mark_unreachable(job, decision.mark_unreachable)
        if decision.settle is not None:
            await self._settle(job, decision.settle)
            return
        if decision.mark_running:
            await self._ports.starter.mark_running(job, self._seen_run)
            return
        did_stop = decision.stop is None or await self._stop(job, decision.stop)
        if decision.activity is not Activity.NONE and not self._is_active():
            self._begin(decision.activity, job)
        if did_stop and self._is_active():
            await self._wait()
        else:
            await self._pause()

    async def _settle(self, job: Job, settle: Settle) -> None:
        failure = settle.failure
        if failure is not None:
            # The node counts a job's tokens once it has it; what it refuses then, another may have room for.
            elsewhere = send_elsewhere(self._ports.nodes, job, reason=failure.reason, message=failure.message)
            settle = elsewhere or settle
        if settle.state in (JobState.QUEUED, JobState.PAUSED):
            await self._replicate_last(job)
        await self._ports.settler.settle(job, settle)

    # Looking.

    async def _observe(self, job: Job) -> Observation:
        view = self._ports.nodes.view(job.node)
        client = self._ports.nodes.client(job.node)
        if view is None or client is None or view.state is NodeState.UNREACHABLE:
            return Observation(sight=NodeSight.LOST)
        if not view.is_reachable:
            return Observation(sight=NodeSight.SILENT)
        if job.run_state in RUN_OVER:
            return Observation(sight=NodeSight.ANSWERED)
        if not self._is_active():
            try:
                self._seen_run = await client.get_run(job.run_key(self._ports.store.installation_id))
            except TunesmithError as error:
                self._log.info("run-not-seen", reason=error.reason, message=error.message)
                return Observation(sight=NodeSight.SILENT)
            if self._seen_run is not None and self._seen_run.state in (RunState.ACCEPTED, RunState.RUNNING):
                # A node that restarted may have forgotten that it was asked to stop.
                self._agreed_stop = None
        return Observation(
            sight=NodeSight.ANSWERED,
            run=self._seen_run,
            interrupt=view.node.interrupt,
            agreed_stop=self._agreed_stop,
        )

    # Doing.

    def _begin(self, activity: Activity, job: Job) -> None:
        client = self._ports.nodes.client(job.node)
        if client is None:
            return
        works: dict[Activity, Coroutine[Any, Any, None]] = {}
        if activity is Activity.START:
            works[activity] = self._ports.starter.start(job, client)
        elif activity is Activity.FOLLOW:
            works[activity] = self._follow(job, client)
        else:
            works[activity] = self._ports.collector.collect(job, client)
        self._doing = activity
        self._activity = asyncio.create_task(works[activity], name=f"{activity.value.lower()}-{job.job_id}")

    async def _follow(self, job: Job, client: NodeClient) -> None:
        key = job.run_key(self._ports.store.installation_id)
        async for batch in gathered(client.watch_run(key, after_run_sequence=job.run_cursor)):
            brought = await ingest(job.job_id, job.attempt, batch, store=self._ports.store, codec=self._ports.codec)
            self._back_off.reset()
            if brought.has_new_checkpoint:
                self._replication.want(brought.job, client)
            if brought.job.run_state in RUN_OVER:
                return
        self._heard_all = True

    async def _take_outcome(self, job: Job, run: ObservedRun) -> None:
        """The log is whole and does not say how the run ended, or not so that it can be read: the node's word counts.
        Without it the job would wait for ever."""
        self._heard_all = False

        def work(tx: Transaction) -> None:
            current = tx.jobs.get(job.job_id)
            if current is None or current.attempt != job.attempt or current.state not in ON_NODE:
                return
            if current.run_state not in RUN_OVER and current.run_cursor >= run.last_run_sequence:
                tx.jobs.update(replace(current, run_state=run.state, failure=run.failure or current.failure))

        self._log.warning("outcome-of-the-node-taken", run_state=run.state)
        await self._ports.store.transact(work)

    async def _replicate_last(self, job: Job) -> None:
        """Copies the last checkpoint before the job leaves its node, so that it may go on elsewhere."""
        view, client = self._ports.nodes.view(job.node), self._ports.nodes.client(job.node)
        await self._replication.settle()
        if view is not None and view.is_reachable and client is not None:
            await self._ports.replicator.replicate_newest(job, client)

    async def _stop(self, job: Job, mode: StopMode) -> bool:
        client = self._ports.nodes.client(job.node)
        if client is None:
            return False
        try:
            failpoint("stop.before-stop-run")
            run = await client.stop_run(job.run_key(self._ports.store.installation_id), mode=mode)
            failpoint("stop.after-stop-run")
        except TunesmithError as error:
            self._log.info("stop-not-agreed", mode=mode, reason=error.reason, message=error.message)
            return False
        if run is None or run.state not in (RunState.ACCEPTED, RunState.RUNNING):
            self._agreed_stop = mode
            return True
        return False

    async def _mark_unreachable(self, job: Job, unreachable: bool) -> None:
        now = self._ports.clock.utc_now()

        def work(tx: Transaction) -> None:
            current = tx.jobs.get(job.job_id)
            if current is None or current.attempt != job.attempt or current.state not in ON_NODE:
                return
            # It may have been heard since this was decided.
            view = self._ports.nodes.view(current.node)
            if unreachable and view is not None and view.state is not NodeState.UNREACHABLE:
                return
            if current.node_unreachable is not unreachable:
                tx.jobs.update(replace(current, node_unreachable=unreachable))
                fact = NodeReachabilityFact(node=current.node, reachable=not unreachable)
                append_facts(tx, current, [fact], codec=self._ports.codec, now=now)

        await self._ports.store.transact(work)

    # Waiting.

    def _is_active(self) -> bool:
        return self._activity is not None and not self._activity.done()

    async def _end_activity(self) -> None:
        if self._activity is not None:
            await end(self._activity)
        self._activity = None
        self._doing = Activity.NONE

    async def _wait(self) -> None:
        """Until woken, or until what is being done is over; what ended badly is tried again after a pause."""
        activity = self._activity
        if activity is None:
            return
        woken = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait({activity, woken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
        if not activity.done():
            return
        self._activity = None
        try:
            activity.result()
        except TunesmithError as error:
            self._log.info("activity-ended", activity=self._doing.value, reason=error.reason, message=error.message)
            await self._pause()
        else:
            if self._doing is Activity.FOLLOW:
                # A stream that ends without the run's outcome is opened again, not at once.
                await self._pause_unless_over()

    async def _pause_unless_over(self) -> None:
        job = await self._ports.store.read(lambda tx: tx.jobs.get(self._job_id))
        if job is not None and job.run_state not in RUN_OVER:
            await self._pause()

    async def _pause(self) -> None:
        """Waits for the back-off's pause, or until woken."""
        sleeping = asyncio.create_task(self._ports.clock.sleep(self._back_off.next_seconds()))
        woken = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait({sleeping, woken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            woken.cancel()


def _fits(activity: Activity, job: Job) -> bool:
    """True while what is being done is still what the job needs."""
    if activity is Activity.START:
        return job.state is JobState.DISPATCHING
    if activity is Activity.COLLECT:
        return job.state in (JobState.RUNNING, JobState.PAUSING)
    return job.run_state not in RUN_OVER
