"""Which queued job goes to which node next, and why the others wait. Pure: looks at values, changes nothing.

First in, first out within a priority; a job never waits for a node that holds its base when another one is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from control_service.domain import retry
from control_service.domain.job import Job, WaitReason
from control_service.domain.node import NodeView


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A job that wants a node. `bound_node`: the only node that has its newest checkpoint; empty if it may go anywhere.

    `moving`: it is RUNNING on a node that control lost, and may be dispatched elsewhere; it has no place in the queue.
    """

    job: Job
    bound_node: str = ""
    moving: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a queued job stands. `position` counts from 1."""

    position: int
    reason: WaitReason = WaitReason.UNSPECIFIED
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class QueueDecision:
    """(job id, node name) pairs to dispatch now, and the place of every queued job."""

    assignments: tuple[tuple[str, str], ...]
    places: Mapping[str, Place]


def decide(
    queue: Sequence[QueuedJob], nodes: Sequence[NodeView], *, jobs_on_node: Mapping[str, Sequence[str]], now: datetime
) -> QueueDecision:
    """Matches queued jobs with free nodes. `jobs_on_node`: ids of live jobs whose run is on each node."""
    free = {view.node.name: free_slots(view, len(jobs_on_node.get(view.node.name, ()))) for view in nodes}
    assignments: list[tuple[str, str]] = []
    places: dict[str, Place] = {}
    # Nodes that an earlier job of the queue goes to or waits for.
    wanted: set[str] = set()
    ordered = sorted(queue, key=lambda queued: (queued.moving, -queued.job.priority, queued.job.job_id))
    for position, queued in enumerate(ordered, start=1):
        job = queued.job
        reason, message, eligible = _eligible(queued, nodes, now)
        open_nodes = [view for view in eligible if free[view.node.name] > 0]
        if open_nodes:
            # False sorts first: a node with the resident base, then by name.
            chosen = min(open_nodes, key=lambda v: (v.resident_base_model != job.spec.base_model, v.node.name))
            free[chosen.node.name] -= 1
            assignments.append((job.job_id, chosen.node.name))
            wanted.add(chosen.node.name)
        elif eligible and wanted.intersection(view.node.name for view in eligible):
            reason, message = WaitReason.QUEUE, f"{position - 1} before it in the queue"
        elif eligible:
            reason, message = WaitReason.NODE_BUSY, _busy_message(eligible, jobs_on_node)
        wanted.update(view.node.name for view in eligible if not open_nodes)
        if not queued.moving:
            places[job.job_id] = Place(position=position, reason=reason, message=message)
    return QueueDecision(assignments=tuple(assignments), places=places)


def free_slots(view: NodeView, num_jobs: int) -> int:
    """Runs that the node can take now: one for each usable device, none while it says that it takes none."""
    if view.report is None or not view.report.accepting:
        return 0
    usable = sum(1 for device in view.report.devices if not device.quarantine_reason)
    # A node that reports no devices still is a machine that accepts a run.
    return max(0, (usable if view.report.devices else 1) - num_jobs)


def eligible_nodes(queued: QueuedJob, nodes: Sequence[NodeView]) -> tuple[WaitReason, str, list[NodeView]]:
    """Nodes that could run the job, free or not; when there are none, why and a message."""
    job = queued.job
    lost_node = job.node if queued.moving else ""
    if any(view.node.name == lost_node and not view.is_lost for view in nodes):
        return WaitReason.NO_NODE, f"node {lost_node} is back, and its attempt goes on", []
    reachable = [view for view in nodes if view.is_reachable and view.node.name != lost_node]
    if not reachable:
        problems = [f"node {view.node.name}: {view.problem}" for view in nodes if view.problem]
        return WaitReason.NO_NODE, "; ".join(["no node is reachable", *problems]), []
    if queued.bound_node:
        reachable = [view for view in reachable if view.node.name == queued.bound_node]
        if not reachable:
            return WaitReason.NO_NODE, f"its checkpoint is on node {queued.bound_node}, which is not reachable", []
    able = [view for view in reachable if can_train(view, job.spec.base_model, job.weights_digest)]
    if not able:
        return WaitReason.NO_MODEL, _no_model_message(job, reachable), []
    roomy = [view for view in able if job.job_id not in view.unfit_jobs]
    if not roomy:
        names = ", ".join(view.node.name for view in able)
        return WaitReason.NO_NODE, f"no device of node {names} has the memory; waits for another node", []
    able = roomy
    staying = [view for view in able if not view.is_draining]
    if not staying:
        return WaitReason.DRAINING, f"draining: {', '.join(view.node.name for view in able)}", []
    return WaitReason.UNSPECIFIED, "", staying


def can_train(view: NodeView, base_model: str, weights_digest: str) -> bool:
    """True when the node has the base, in the pinned version if one is pinned, and refuses nothing."""
    model = view.model(base_model)
    if model is None or model.problem or view.problem:
        return False
    return not weights_digest or not model.weights_digest or model.weights_digest == weights_digest


def _eligible(
    queued: QueuedJob, nodes: Sequence[NodeView], now: datetime
) -> tuple[WaitReason, str, Sequence[NodeView]]:
    not_before = queued.job.not_before
    # A time that is farther off than any back-off was written by a clock that has been set back since.
    longest = timedelta(seconds=retry.MAX_BACK_OFF_SECONDS)
    if not_before is not None and now < not_before <= now + longest:
        return WaitReason.BACK_OFF, f"tries again after {not_before:%H:%M:%S} UTC", ()
    return eligible_nodes(queued, nodes)


def _no_model_message(job: Job, reachable: Sequence[NodeView]) -> str:
    parts = [f"no reachable node can train {job.spec.base_model}"]
    for view in reachable:
        model = view.model(job.spec.base_model)
        problem = view.problem or (model.problem if model else "")
        if model is not None and not problem:
            problem = "it has other weights than those that the job began with"
        if problem:
            parts.append(f"node {view.node.name}: {problem}")
    return "; ".join(parts)


def _busy_message(eligible: Sequence[NodeView], jobs_on_node: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for view in eligible:
        jobs = jobs_on_node.get(view.node.name, ())
        parts.append(
            f"job {', '.join(jobs)} on node {view.node.name}" if jobs else f"node {view.node.name}, which takes no run"
        )
    return "waits for " + "; ".join(parts)
