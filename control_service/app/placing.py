"""Sends a job that its node has too little memory for to another node. Chooses none: the scheduler passes over those
that were found too small."""

from __future__ import annotations

from control_service.app.node_monitor import NodeMonitor
from control_service.domain.job import Job
from control_service.domain.job_state import JobState
from control_service.domain.queue_policy import can_train
from control_service.domain.reconcile import Settle

_TOO_SMALL = "DOES_NOT_FIT"
# One that is to be paused or cancelled goes nowhere.
_MOVED = frozenset({JobState.DISPATCHING, JobState.RUNNING})


def send_elsewhere(nodes: NodeMonitor, job: Job, *, reason: str, message: str) -> Settle | None:
    """What becomes of a job that its node refused or failed with `reason`, if another node may have the memory.

    The node is not asked for this job again. Nothing is counted as a retry: no step was made.
    """
    if reason != _TOO_SMALL or job.state not in _MOVED or not _others_may_fit(nodes, job):
        return None
    nodes.mark_unfit(job.node, job.job_id)
    return Settle(state=JobState.QUEUED, message=f"node {job.node}: {message}", keeps_failure=True)


def _others_may_fit(nodes: NodeMonitor, job: Job) -> bool:
    """Whether a reachable node that has the base was not found too small yet."""
    return any(
        view.node.name != job.node
        and view.is_reachable
        and job.job_id not in view.unfit_jobs
        and can_train(view, job.spec.base_model, job.weights_digest)
        for view in nodes.views()
    )
