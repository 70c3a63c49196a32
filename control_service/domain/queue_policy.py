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

QueueKey = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """What the policy looks at of a job that wants a node. `bound_node`: the only node that has its newest checkpoint;
    empty if it may go anywhere. `lost_node`: the node that it is on, which control lost; it may be dispatched elsewhere
    and has no place in the queue. Empty for a job of the queue.
    """

    job_id: str
    priority: int
    base_model: str
    # Pinned weights; empty if none are.
    weights_digest: str = ""
    not_before: datetime | None = None
    bound_node: str = ""
    lost_node: str = ""

    @classmethod
    def of(cls, job: Job, *, bound_node: str = "", moving: bool = False) -> QueuedJob:
        """A job of the queue or, if it is `moving`, one that is to leave its node."""
        return cls(
            job_id=job.job_id,
            priority=job.priority,
            base_model=job.spec.base_model,
            weights_digest=job.weights_digest,
            not_before=job.not_before,
            bound_node=bound_node,
            lost_node=job.node if moving else "",
        )

    @property
    def key(self) -> QueueKey:
        """Ascending in the order in which jobs of the queue are served."""
        return queue_key(self.priority, self.job_id)


def queue_key(priority: int, job_id: str) -> QueueKey:
    """Where a job of the queue stands: jobs of smaller keys are before it."""
    return -priority, job_id


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


class QueueWalk:
    """Goes through jobs in the order in which they are served, and gives each what those before it left. Behind a job
    that found no node, others that may go to the same nodes change nothing for anybody, and may be left out."""

    def __init__(self, nodes: Sequence[NodeView], *, jobs_on_node: Mapping[str, Sequence[str]], now: datetime) -> None:
        """`jobs_on_node`: ids of live jobs whose run is on each node."""
        self._nodes = nodes
        self._jobs_on_node = jobs_on_node
        self._now = now
        self._free = {view.node.name: free_slots(view, len(jobs_on_node.get(view.node.name, ()))) for view in nodes}
        # Nodes that an earlier job goes to or waits for.
        self._wanted: set[str] = set()

    def place(self, queued: QueuedJob, position: int) -> Place:
        """Why a job would wait that came now. `position` counts from 1."""
        reason, message, eligible = _eligible(queued, self._nodes, self._now)
        if any(self._free[view.node.name] > 0 for view in eligible):
            return Place(position=position)
        if self._wanted.intersection(view.node.name for view in eligible):
            return Place(position=position, reason=WaitReason.QUEUE, message=f"{position - 1} before it in the queue")
        if eligible:
            message = _busy_message(eligible, self._jobs_on_node)
            return Place(position=position, reason=WaitReason.NODE_BUSY, message=message)
        return Place(position=position, reason=reason, message=message)

    def take(self, queued: QueuedJob) -> str:
        """The node that the job goes to; empty when it finds none."""
        _, _, eligible = _eligible(queued, self._nodes, self._now)
        open_nodes = [view for view in eligible if self._free[view.node.name] > 0]
        if not open_nodes:
            self._wanted.update(view.node.name for view in eligible)
            return ""
        # False sorts first: a node with the resident base, then by name.
        chosen = min(open_nodes, key=lambda v: (v.resident_base_model != queued.base_model, v.node.name)).node.name
        self._free[chosen] -= 1
        self._wanted.add(chosen)
        return chosen


def decide(
    queue: Sequence[QueuedJob], nodes: Sequence[NodeView], *, jobs_on_node: Mapping[str, Sequence[str]], now: datetime
) -> QueueDecision:
    """Matches queued jobs with free nodes, looking at each. `jobs_on_node`: as of `QueueWalk`."""
    walk = QueueWalk(nodes, jobs_on_node=jobs_on_node, now=now)
    assignments: list[tuple[str, str]] = []
    places: dict[str, Place] = {}
    ordered = sorted(queue, key=lambda queued: (bool(queued.lost_node), queued.key))
    for position, queued in enumerate(ordered, start=1):
        if not queued.lost_node:
            places[queued.job_id] = walk.place(queued, position)
        if node := walk.take(queued):
            assignments.append((queued.job_id, node))
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
    lost_node = queued.lost_node
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
    able = [view for view in reachable if can_train(view, queued.base_model, queued.weights_digest)]
    if not able:
        return WaitReason.NO_MODEL, _no_model_message(queued.base_model, reachable), []
    roomy = [view for view in able if queued.job_id not in view.unfit_jobs]
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


def is_resting(not_before: datetime, now: datetime) -> bool:
    """True until that time. One that is farther off than any back-off was written by a clock that has been set back
    since, and is over."""
    return now < not_before <= now + timedelta(seconds=retry.MAX_BACK_OFF_SECONDS)


def _eligible(
    queued: QueuedJob, nodes: Sequence[NodeView], now: datetime
) -> tuple[WaitReason, str, Sequence[NodeView]]:
    if queued.not_before is not None and is_resting(queued.not_before, now):
        return WaitReason.BACK_OFF, f"tries again after {queued.not_before:%H:%M:%S} UTC", ()
    return eligible_nodes(queued, nodes)


def _no_model_message(base_model: str, reachable: Sequence[NodeView]) -> str:
    parts = [f"no reachable node can train {base_model}"]
    for view in reachable:
        model = view.model(base_model)
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
