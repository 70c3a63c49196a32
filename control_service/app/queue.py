"""The queue as it stands: an index in memory of what the database says, that commits keep up to date. Reads again the
jobs that moved and no others; at first, and after that never, all that wait. Moves no job."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from control_service.app.ports import Clock, NodeDirectory
from control_service.app.store_ports import CommitNotice, Store, Transaction
from control_service.domain.artifact import CheckpointStatus
from control_service.domain.errors import Unavailable
from control_service.domain.job import Job, JobView
from control_service.domain.job_state import ON_NODE, JobState
from control_service.domain.node import NodeView
from control_service.domain.queue_index import QueueIndex
from control_service.domain.queue_policy import QueuedJob, decide
from control_service.domain.resume import bound_node
from control_service.domain.run import RUN_OVER, RunState

_log = structlog.get_logger(__name__)

# So many whole records are in memory at a time while the index is built, beside what it keeps of each.
_JOBS_A_PAGE = 500
_IN_INDEX = (JobState.QUEUED, *ON_NODE)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What the index knows of a job; `node` is that which it is on, or empty."""

    queued: QueuedJob | None
    node: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """(job id, node name) pairs to dispatch now; when the first back-off ends of the jobs that rest, if any does."""

    assignments: Sequence[tuple[str, str]]
    next_time: datetime | None


class JobQueue:
    """One for a store, made before anything is committed that it is to know of."""

    def __init__(self, *, store: Store, nodes: NodeDirectory, clock: Clock) -> None:
        self._store = store
        self._nodes = nodes
        self._clock = clock
        self._index = QueueIndex()
        self._is_built = False
        # Jobs of which the index knows what was.
        self._moved: set[str] = set()
        self._settling = asyncio.Lock()
        store.subscribe(self._on_commit)

    async def view_of(self, job: Job) -> JobView:
        """A job that was read just now, with its position and why it waits."""
        return (await self.views_of([job]))[0]

    async def view_of_stored(self, job: Job) -> JobView:
        """A job that was written just now; without its place where the queue cannot be read. That it is stored is the
        answer: who heard of a failure would ask for it again."""
        try:
            return await self.view_of(job)
        except Unavailable as error:
            _log.warning("place-not-read", job_id=job.job_id, reason=error.reason)
            return JobView(job=job)

    async def views_of(self, jobs: Sequence[Job]) -> list[JobView]:
        """Jobs that were read just now, with their places."""
        queued = [job for job in jobs if job.state is JobState.QUEUED]
        if not queued:
            return [JobView(job=job) for job in jobs]
        await self._settle()
        places = self._index.places(queued, self._nodes.views(), self._clock.steady_utc_now())
        return [
            JobView(job=job)
            if (place := places.get(job.job_id)) is None
            else JobView(job=job, queue_position=place.position, wait_reason=place.reason, wait_message=place.message)
            for job in jobs
        ]

    async def choose(self) -> Choice:
        """What to dispatch now, as far as is known: to be decided again where it is stored."""
        await self._settle()
        # Of after what is known, or a back-off that began meanwhile would be farther off than any. And one for both,
        # or a back-off that ends between them would be in neither.
        now = self._clock.steady_utc_now()
        assignments = self._index.assignments(self._nodes.views(), now)
        return Choice(assignments=assignments, next_time=self._index.next_time(now))

    def _on_commit(self, notice: CommitNotice) -> None:
        self._moved |= notice.moved_jobs

    async def _settle(self) -> None:
        """The index knows all that was committed before."""
        async with self._settling:
            if not self._is_built:
                self._moved.clear()
                self._apply(await self._store.read(_read_all))
                self._is_built = True
            if self._moved:
                moved, self._moved = self._moved, set()
                try:
                    entries = await self._store.read(lambda tx: _read(tx, moved))
                except BaseException:
                    self._moved |= moved
                    raise
                self._apply(entries)

    def _apply(self, entries: Mapping[str, _Entry]) -> None:
        for job_id, entry in entries.items():
            self._index.put(job_id, entry.queued, node=entry.node)


def decide_again(
    tx: Transaction, job_ids: Collection[str], nodes: Sequence[NodeView], now: datetime
) -> Sequence[tuple[str, str]]:
    """What the queue policy makes of some jobs and of what is on the nodes, as the transaction sees them."""
    jobs_on_node: dict[str, list[str]] = {}
    for job in tx.jobs.in_states(ON_NODE):
        jobs_on_node.setdefault(job.node, []).append(job.job_id)
    queue = [entry.queued for entry in _read(tx, job_ids).values() if entry.queued is not None]
    return decide(queue, nodes, jobs_on_node=jobs_on_node, now=now).assignments


def _read_all(tx: Transaction) -> Mapping[str, _Entry]:
    entries: dict[str, _Entry] = {}
    before_job_id = ""
    while True:
        page = tx.jobs.list_page(before_job_id=before_job_id, limit=_JOBS_A_PAGE, project_id=0, states=_IN_INDEX)
        entries |= {job.job_id: _entry(tx, job) for job in page}
        if len(page) < _JOBS_A_PAGE:
            # As the index has them: what is put at an end moves nothing.
            return dict(sorted(entries.items()))
        before_job_id = page[-1].job_id


def _read(tx: Transaction, job_ids: Collection[str]) -> Mapping[str, _Entry]:
    return {job_id: _entry(tx, tx.jobs.get(job_id)) for job_id in job_ids}


def _entry(tx: Transaction, job: Job | None) -> _Entry:
    """A running job whose node is lost wants another one when it may go on elsewhere."""
    if job is not None and job.state is JobState.QUEUED:
        # One that never ran has no checkpoint; of those there may be thousands.
        checkpoints = tx.checkpoints.list_for_job(job.job_id) if job.attempt else ()
        return _Entry(queued=QueuedJob.of(job, bound_node=bound_node(checkpoints)), node="")
    if job is None or job.state not in ON_NODE:
        return _Entry(queued=None, node="")
    return _Entry(queued=QueuedJob.of(job, moving=True) if _may_move(tx, job) else None, node=job.node)


def _may_move(tx: Transaction, job: Job) -> bool:
    if job.state not in (JobState.DISPATCHING, JobState.RUNNING) or not job.node_unreachable:
        return False
    checkpoints = tx.checkpoints.list_for_job(job.job_id)
    if job.run_state is RunState.SUCCEEDED:
        # Its artifacts are on the lost node, and are waited for unless little is to be done again.
        return any(checkpoint.status is CheckpointStatus.REPLICATED for checkpoint in checkpoints)
    # Another outcome is settled, wherever the node is; and work that only the lost node has is waited for.
    return job.run_state not in RUN_OVER and not bound_node(checkpoints)
