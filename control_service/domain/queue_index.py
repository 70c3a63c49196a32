"""The queue, kept in order while jobs come and go: a place in it is found without going through the jobs before it, and
what goes where next without going through those that wait. Decides by `queue_policy`, as if it looked at each.

Jobs are of one kind when they may go to the same nodes. Behind one that found no node the others of its kind find none
either, so that few more jobs are looked at than there are kinds and free places. Reads no clock; not for two threads.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from heapq import heapify, heappop, heappush

from control_service.domain.job import Job
from control_service.domain.node import NodeView
from control_service.domain.queue_policy import Place, QueuedJob, QueueKey, QueueWalk, is_resting, queue_key

_Kind = tuple[str, str, str]


class QueueIndex:
    """The times that it is asked with must not go back, nor be of before what was put: a back-off that begins after
    them is taken for one of a clock that has been set back since."""

    def __init__(self) -> None:
        # Jobs of the queue, and their keys in order: of all, and of each kind's that do not rest.
        self._queued: dict[str, QueuedJob] = {}
        self._order: list[QueueKey] = []
        self._kinds: dict[_Kind, list[QueueKey]] = {}
        # Jobs that may rest and were not looked at yet; those that do, the first to end before the others. Some of
        # both have left the queue or come anew meanwhile.
        self._may_rest: list[QueuedJob] = []
        self._resting: list[tuple[datetime, str]] = []
        # Jobs that may leave the node that they are on.
        self._moving: dict[str, QueuedJob] = {}
        self._node_of: dict[str, str] = {}
        self._jobs_on_node: dict[str, list[str]] = {}

    def put(self, job_id: str, queued: QueuedJob | None, *, node: str) -> None:
        """What is known of a job from now on: None when it wants no node; the node that it is on, or empty."""
        self._forget(job_id)
        if node:
            self._node_of[job_id] = node
            insort(self._jobs_on_node.setdefault(node, []), job_id)
        if queued is None:
            return
        if queued.lost_node:
            self._moving[job_id] = queued
            return
        self._queued[job_id] = queued
        insort(self._order, queued.key)
        if queued.not_before is None:
            insort(self._kinds.setdefault(_kind(queued), []), queued.key)
        else:
            self._may_rest.append(queued)

    def assignments(self, nodes: Sequence[NodeView], now: datetime) -> list[tuple[str, str]]:
        """(job id, node name) pairs to dispatch now, in order."""
        walk = self._walk(nodes, now)
        assigned = walk.go_on(None)
        for moving in sorted(self._moving.values(), key=lambda moving: moving.key):
            if node := walk.policy.take(moving):
                assigned.append((moving.job_id, node))
        return assigned

    def places(self, jobs: Collection[Job], nodes: Sequence[NodeView], now: datetime) -> Mapping[str, Place]:
        """Where jobs stand that are or were in the queue. One that has left it stands where it stood, without a
        reason."""
        walk = self._walk(nodes, now)
        places = {}
        for key in sorted(queue_key(job.priority, job.job_id) for job in jobs):
            walk.go_on(key)
            position = bisect_left(self._order, key) + 1
            queued = self._queued.get(key[1])
            places[key[1]] = Place(position=position) if queued is None else walk.policy.place(queued, position)
        return places

    def next_time(self, now: datetime) -> datetime | None:
        """When the next job that rests has rested; None when none does."""
        self._wake(now)
        return self._resting[0][0] if self._resting else None

    def _walk(self, nodes: Sequence[NodeView], now: datetime) -> _KindWalk:
        self._wake(now)
        policy = QueueWalk(nodes, jobs_on_node=self._jobs_on_node, now=now)
        return _KindWalk(self._kinds, self._queued, policy, nodes)

    def _wake(self, now: datetime) -> None:
        """Puts the jobs that have rested among their kinds."""
        for queued in self._may_rest:
            assert queued.not_before is not None
            if self._queued.get(queued.job_id) is queued:
                if is_resting(queued.not_before, now):
                    heappush(self._resting, (queued.not_before, queued.job_id))
                else:
                    self._end_rest(queued)
        self._may_rest.clear()
        while self._resting:
            not_before, job_id = self._resting[0]
            resting = self._queued.get(job_id)
            if resting is not None and resting.not_before == not_before:
                if now < not_before:
                    break
                self._end_rest(resting)
            heappop(self._resting)

    def _end_rest(self, queued: QueuedJob) -> None:
        awake = self._queued[queued.job_id] = replace(queued, not_before=None)
        insort(self._kinds.setdefault(_kind(awake), []), awake.key)

    def _forget(self, job_id: str) -> None:
        self._moving.pop(job_id, None)
        node = self._node_of.pop(job_id, "")
        if node:
            on_node = self._jobs_on_node[node]
            on_node.remove(job_id)
            if not on_node:
                del self._jobs_on_node[node]
        queued = self._queued.pop(job_id, None)
        if queued is None:
            return
        _remove(self._order, queued.key)
        kind = _kind(queued)
        keys = self._kinds.get(kind, [])
        if queued.not_before is None:
            _remove(keys, queued.key)
            if not keys:
                del self._kinds[kind]


class _KindWalk:
    """A walk of the policy's that leaves out what changes nothing."""

    def __init__(
        self,
        kinds: Mapping[_Kind, Sequence[QueueKey]],
        queued: Mapping[str, QueuedJob],
        policy: QueueWalk,
        nodes: Sequence[NodeView],
    ) -> None:
        self.policy = policy
        self._kinds = kinds
        self._queued = queued
        # Jobs that a node was found too small for, which others of their kind may still go to.
        self._unfit = frozenset[str]().union(*(view.unfit_jobs for view in nodes))
        # The next job of every kind that may still find a node: key, kind and how many of it were before.
        self._heads = [(keys[0], kind, 0) for kind, keys in kinds.items()]
        heapify(self._heads)

    def go_on(self, until: QueueKey | None) -> list[tuple[str, str]]:
        """Gives nodes to jobs before the key, or to all: (job id, node name)."""
        assigned = []
        while self._heads and (until is None or self._heads[0][0] < until):
            key, kind, num_before = heappop(self._heads)
            job_id = key[1]
            node = self.policy.take(self._queued[job_id])
            if node:
                assigned.append((job_id, node))
            keys = self._kinds[kind]
            if (node or job_id in self._unfit) and num_before + 1 < len(keys):
                heappush(self._heads, (keys[num_before + 1], kind, num_before + 1))
        return assigned


def _kind(queued: QueuedJob) -> _Kind:
    return queued.base_model, queued.weights_digest, queued.bound_node


def _remove(keys: list[QueueKey], key: QueueKey) -> None:
    del keys[bisect_left(keys, key)]
