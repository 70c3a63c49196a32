"""The queue policy against a model of its own: whatever comes, goes, is lost or drained, no device has two jobs, nobody
is passed over by one that came later, and nobody waits while there is a place. The index of the queue, which looks at
few of the jobs, says what `decide` says, which looks at each."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from control_service.domain.job import Job, WaitReason
from control_service.domain.node import Device, Node, NodeCapabilities, NodeReport, NodeState, NodeView
from control_service.domain.queue_index import QueueIndex
from control_service.domain.queue_policy import QueueDecision, QueuedJob, decide
from tests.fakes.control_jobs import NOW, SPEC, make_job, make_node_model

_BASES = ("org/one", "org/two")
_NAMES = ("a", "b", "c")


def _view(name: str, *, num_devices: int, bases: tuple[str, ...]) -> NodeView:
    device = Device(index=0, type="cuda", name="d", total_memory_bytes=1, free_memory_bytes=1)
    models = tuple(map(make_node_model, bases))
    return NodeView(
        node=Node(name=name, address="x:1", create_time=NOW),
        state=NodeState.REACHABLE,
        report=NodeReport(node_name=name, instance_id="1", devices=(device,) * num_devices),
        capabilities=NodeCapabilities(node_name=name, instance_id="1", models=models),
    )


class QueueMachine(RuleBasedStateMachine):
    """Carries out what `decide` decides, and looks at every decision."""

    @initialize(
        devices=st.lists(st.integers(1, 2), min_size=1, max_size=3),
        bases=st.lists(st.sampled_from([_BASES, _BASES[:1], _BASES[1:]]), min_size=3, max_size=3),
    )
    def begin(self, devices: list[int], bases: list[tuple[str, ...]]) -> None:
        self.now = NOW
        self.views = {
            name: _view(name, num_devices=count, bases=bases[index])
            for index, (name, count) in enumerate(zip(_NAMES, devices, strict=False))
        }
        self.num_made = 0
        self.queue: dict[str, QueuedJob] = {}
        self.jobs: dict[str, Job] = {}
        self.index = QueueIndex()
        # Those of them whose node was lost.
        self.moving: set[str] = set()
        self.placed: dict[str, tuple[Job, str]] = {}

    @rule(priority=st.sampled_from([0, 0, 1]), base=st.sampled_from(_BASES), bound=st.sampled_from(["", "", *_NAMES]))
    def submit(self, priority: int, base: str, bound: str) -> None:
        self._submit(priority, base, bound)

    @rule(priority=st.sampled_from([0, 1]), base=st.sampled_from(_BASES), count=st.integers(5, 20))
    def submit_many(self, priority: int, base: str, count: int) -> None:
        for _ in range(count):
            self._submit(priority, base, "")

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.queue)))
        del self.queue[job_id], self.jobs[job_id]
        self.index.put(job_id, None, node="")

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def is_too_large(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.queue)))
        name = data.draw(st.sampled_from(sorted(self.views)))
        view = self.views[name]
        self.views[name] = replace(view, unfit_jobs=view.unfit_jobs | {job_id})

    @precondition(lambda self: self.placed)
    @rule(data=st.data())
    def node_is_lost(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.placed)))
        name = self.placed[job_id][1]
        self.views[name] = replace(self.views[name], state=NodeState.UNREACHABLE)
        self.moving.add(job_id)
        self.index.put(job_id, self._moving(job_id), node=name)

    def _submit(self, priority: int, base: str, bound: str) -> None:
        self.num_made += 1
        job = make_job(
            job_id=f"{self.num_made:026d}", priority=priority, spec=replace(SPEC, base_model=base), create_time=self.now
        )
        self._enqueue(job, bound)

    def _enqueue(self, job: Job, bound: str = "") -> None:
        queued = QueuedJob.of(job, bound_node=bound)
        self.jobs[job.job_id], self.queue[job.job_id] = job, queued
        self.index.put(job.job_id, queued, node="")

    @precondition(lambda self: self.placed)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.placed)))
        job, _ = self.placed.pop(job_id)
        self.moving.discard(job_id)
        self.index.put(job_id, None, node="")
        if fails:
            self._enqueue(replace(job, not_before=self.now + timedelta(seconds=2)))

    @rule(data=st.data(), state=st.sampled_from([NodeState.REACHABLE, NodeState.REACHABLE, NodeState.UNREACHABLE]))
    def node_comes_or_goes(self, data: st.DataObject, state: NodeState) -> None:
        name = data.draw(st.sampled_from(sorted(self.views)))
        self.views[name] = replace(self.views[name], state=state)

    @rule(data=st.data(), draining=st.booleans(), accepting=st.booleans())
    def node_changes_its_mind(self, data: st.DataObject, draining: bool, accepting: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.views)))
        view = self.views[name]
        assert view.report is not None
        report = replace(view.report, accepting=accepting)
        self.views[name] = replace(view, node=replace(view.node, draining=draining), report=report)

    @rule(seconds=st.integers(0, 5))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def clock_is_set_back(self) -> None:
        self.now -= timedelta(hours=1)
        # As a service that was begun anew since: a running one's time does not go back.
        self.index = QueueIndex()
        for job_id, queued in self.queue.items():
            self.index.put(job_id, queued, node="")
        for job_id, (_, name) in self.placed.items():
            self.index.put(job_id, self._moving(job_id) if job_id in self.moving else None, node=name)

    def _moving(self, job_id: str) -> QueuedJob:
        job, name = self.placed[job_id]
        return QueuedJob.of(replace(job, node=name), moving=True)

    @rule()
    def schedule(self) -> None:
        on_node: dict[str, list[str]] = {}
        for job_id, (_, node) in self.placed.items():
            on_node.setdefault(node, []).append(job_id)
        on_node = {node: sorted(job_ids) for node, job_ids in on_node.items()}
        views = list(self.views.values())
        moving = [self._moving(job_id) for job_id in self.moving]
        decision = decide([*self.queue.values(), *moving], views, jobs_on_node=on_node, now=self.now)
        assert self.index.assignments(views, self.now) == list(decision.assignments)
        assert self.index.places(self.jobs.values(), views, self.now) == decision.places
        for job in self.jobs.values():
            assert self.index.places([job], views, self.now) == {job.job_id: decision.places[job.job_id]}
        self._carry_out(decision)

    def _carry_out(self, decision: QueueDecision) -> None:
        assigned = dict(decision.assignments)
        assert len(assigned) == len(decision.assignments)
        assert set(decision.places) == set(self.queue)
        assert sorted(place.position for place in decision.places.values()) == list(range(1, len(self.queue) + 1))
        for job_id, node in assigned.items():
            if job_id in self.moving:
                assert self.placed[job_id][1] != node
                continue
            assert self._may_go(self.queue[job_id], node)
            for other_id, other in self.queue.items():
                # First in, first out within a priority.
                if other_id not in assigned and _order(other) < _order(self.queue[job_id]):
                    assert not self._may_go(other, node)
        for job_id, node in assigned.items():
            if job_id in self.moving:
                self.moving.remove(job_id)
                self.placed[job_id] = (self.placed[job_id][0], node)
            else:
                del self.queue[job_id]
                self.placed[job_id] = (self.jobs.pop(job_id), node)
            self.index.put(job_id, None, node=node)
        for job_id, queued in sorted(self.queue.items()):
            # Nobody waits while there is a place, and everybody is told why.
            assert not any(self._may_go(queued, name) and self._num_free(name) > 0 for name in self.views)
            assert decision.places[job_id].reason is not WaitReason.UNSPECIFIED

    @invariant()
    def no_device_has_two_jobs(self) -> None:
        for name in getattr(self, "views", ()):
            count = sum(1 for _, node in self.placed.values() if node == name)
            report = self.views[name].report
            assert report is not None
            assert count <= len(report.devices)

    def _may_go(self, queued: QueuedJob, name: str) -> bool:
        view, not_before = self.views[name], queued.not_before
        wait = None if not_before is None else (not_before - self.now).total_seconds()
        return (
            view.is_reachable
            and not view.node.draining
            and queued.bound_node in ("", name)
            and queued.job_id not in view.unfit_jobs
            and view.model(queued.base_model) is not None
            and not (wait is not None and 0 < wait <= 60)
        )

    def _num_free(self, name: str) -> int:
        report = self.views[name].report
        assert report is not None
        taken = sum(1 for _, node in self.placed.values() if node == name)
        return len(report.devices) - taken if report.accepting else 0


def _order(queued: QueuedJob) -> tuple[int, str]:
    return -queued.priority, queued.job_id


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
