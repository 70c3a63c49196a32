"""Reads the queue and what occupies the nodes, and places jobs in it by the queue policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from control_service.app.store_ports import Transaction
from control_service.domain.artifact import CheckpointStatus
from control_service.domain.job import Job, JobView
from control_service.domain.job_state import ON_NODE, JobState
from control_service.domain.node import NodeView
from control_service.domain.queue_policy import Place, QueueDecision, QueuedJob, decide
from control_service.domain.resume import bound_node
from control_service.domain.run import RUN_OVER, RunState


@dataclass(frozen=True, kw_only=True)
class QueueSnapshot:
    """Jobs that want a node, and the ids of those that have one."""

    queue: Sequence[QueuedJob]
    jobs_on_node: Mapping[str, Sequence[str]]

    def decide(self, nodes: Sequence[NodeView], now: datetime) -> QueueDecision:
        """Applies the queue policy."""
        return decide(self.queue, nodes, jobs_on_node=self.jobs_on_node, now=now)


def read_queue(tx: Transaction) -> QueueSnapshot:
    """The queue as the transaction sees it. A running job whose node is lost is in it when it may go on elsewhere."""
    queue: list[QueuedJob] = []
    jobs_on_node: dict[str, list[str]] = {}
    for job in tx.jobs.in_states({JobState.QUEUED, *ON_NODE}):
        if job.state is JobState.QUEUED:
            # One that never ran has no checkpoint; of those there may be thousands.
            checkpoints = tx.checkpoints.list_for_job(job.job_id) if job.attempt else ()
            queue.append(QueuedJob(job=job, bound_node=bound_node(checkpoints)))
            continue
        jobs_on_node.setdefault(job.node, []).append(job.job_id)
        if _may_move(tx, job):
            queue.append(QueuedJob(job=job, moving=True))
    return QueueSnapshot(queue=queue, jobs_on_node=jobs_on_node)


def _may_move(tx: Transaction, job: Job) -> bool:
    if job.state not in (JobState.DISPATCHING, JobState.RUNNING) or not job.node_unreachable:
        return False
    checkpoints = tx.checkpoints.list_for_job(job.job_id)
    if job.run_state is RunState.SUCCEEDED:
        # Its artifacts are on the lost node, and are waited for unless little is to be done again.
        return any(checkpoint.status is CheckpointStatus.REPLICATED for checkpoint in checkpoints)
    # Another outcome is settled, wherever the node is; and work that only the lost node has is waited for.
    return job.run_state not in RUN_OVER and not bound_node(checkpoints)


def views_of(tx: Transaction, jobs: Sequence[Job], nodes: Sequence[NodeView], now: datetime) -> list[JobView]:
    """The jobs with their places."""
    places: Mapping[str, Place] = {}
    if any(job.state is JobState.QUEUED for job in jobs):
        places = read_queue(tx).decide(nodes, now).places
    return [_view(job, places.get(job.job_id)) for job in jobs]


def _view(job: Job, place: Place | None) -> JobView:
    if place is None:
        return JobView(job=job)
    return JobView(job=job, queue_position=place.position, wait_reason=place.reason, wait_message=place.message)
