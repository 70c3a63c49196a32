"""Sees to what no live job needs any more: stops runs that go on without one, lets nodes free those that are over, and
frees control's copies of checkpoints and of what jobs started from. Writes into no job's log: that of a job that is
over is closed."""

from __future__ import annotations

import asyncio

import structlog

from control_service.app.back_off import BackOffConfig
from control_service.app.content import free_unnamed
from control_service.app.node_monitor import NodeMonitor
from control_service.app.ports import BlobStore, Clock
from control_service.app.store_ports import CommitNotice, Store, Transaction
from control_service.app.tasks import TaskSet
from control_service.domain.artifact import CheckpointStatus
from control_service.domain.errors import TunesmithError
from control_service.domain.failpoints import failpoint
from control_service.domain.reconcile import LeftoverFate, leftover_fate
from control_service.domain.run import ObservedRun, RunKey, RunState, StopMode

_log = structlog.get_logger(__name__)


class LeftoverSweeper:
    """Looks at every report of every node, and again when a job moved."""

    def __init__(
        self,
        *,
        store: Store,
        nodes: NodeMonitor,
        blobs: BlobStore,
        clock: Clock,
        back_off: BackOffConfig,
        release_runs: bool,
    ) -> None:
        self._blobs = blobs
        self._clock = clock
        self._back_off = back_off
        self._store = store
        self._nodes = nodes
        self._release_runs = release_runs
        self._changed = asyncio.Event()
        # Asked for and answered, while the node still reports the run in that state.
        self._done: set[tuple[str, RunKey, RunState]] = set()
        self._tasks = TaskSet()
        store.subscribe(self._on_commit)
        nodes.subscribe(lambda _: self._changed.set())

    def start(self) -> None:
        """Sweeps whenever something changed."""
        self._tasks.keep("leftovers", self._run, clock=self._clock, back_off=self._back_off)

    async def stop(self) -> None:
        """Ends the task."""
        await self._tasks.stop_all()

    def _on_commit(self, notice: CommitNotice) -> None:
        if notice.jobs_changed:
            self._changed.set()

    async def _run(self) -> None:
        # Also when it begins again after an error: what woke it then was not seen to.
        self._changed.set()
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._release_runs:
                await self._forget_checkpoints()
            await self._forget_starts()
            for view in self._nodes.views():
                runs = view.report.runs if view.is_reachable and view.report is not None else ()
                for run in runs:
                    await self._see_to(view.node.name, run)
                present = {run.key for run in runs}
                self._done = {done for done in self._done if done[0] != view.node.name or done[1] in present}

    async def _forget_checkpoints(self) -> None:
        """Nothing goes on from the checkpoints of a job that is over, and its run is released."""

        def work(tx: Transaction) -> set[str]:
            unneeded = tx.checkpoints.list_unneeded()
            for checkpoint in unneeded:
                tx.checkpoints.set_status(checkpoint.job_id, checkpoint.name, CheckpointStatus.DELETED)
            replicated = [c for c in unneeded if c.status is CheckpointStatus.REPLICATED]
            return {file.sha256 for checkpoint in replicated for file in checkpoint.files}

        if await self._store.read(lambda tx: bool(tx.checkpoints.list_unneeded())):
            await free_unnamed(await self._store.transact(work), store=self._store, blobs=self._blobs)

    async def _forget_starts(self) -> None:
        """What a job that succeeded began with is not needed again."""

        def work(tx: Transaction) -> set[str]:
            return {sha256 for job_id in tx.jobs.list_unneeded_starts() for sha256 in tx.jobs.release_start(job_id)}

        if await self._store.read(lambda tx: bool(tx.jobs.list_unneeded_starts())):
            await free_unnamed(await self._store.transact(work), store=self._store, blobs=self._blobs)

    async def _see_to(self, node: str, run: ObservedRun) -> None:
        job = await self._store.read(lambda tx: tx.jobs.get(run.key.job_id))
        fate = leftover_fate(run, job)
        client = self._nodes.client(node)
        if fate is LeftoverFate.KEEP or client is None or (node, run.key, run.state) in self._done:
            return
        if fate is LeftoverFate.RELEASE and not self._release_runs:
            return
        log = _log.bind(node=node, job_id=run.key.job_id, attempt=run.key.attempt, fate=fate.value)
        try:
            if fate is LeftoverFate.STOP:
                await client.stop_run(run.key, mode=StopMode.CANCEL)
            else:
                failpoint("release.before-release-run")
                freed_bytes = await client.release_run(run.key)
                failpoint("release.after-release-run")
                log = log.bind(freed_bytes=freed_bytes)
        except TunesmithError as error:
            log.info("leftover-stays", reason=error.reason, message=error.message)
            return
        self._done.add((node, run.key, run.state))
        log.info("leftover-seen-to")
