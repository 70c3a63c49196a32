"""The queue policy against a model of its own: whatever comes, goes, is lost or drained, no device has two jobs, nobody
is passed over by one that came later, and nobody waits while there is a place."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from control_service.domain.job import Job, WaitReason
from control_service.domain.node import Device, Node, NodeCapabilities, NodeModel, NodeReport, NodeState, NodeView
from control_service.domain.queue_policy import QueuedJob, decide
from tests.fakes.control_jobs import NOW, SPEC, make_job

_BASES = ("org/one", "org/two")
_NAMES = ("a", "b", "c")


def _view(name: str, *, num_devices: int, bases: tuple[str, ...]) -> NodeView:
    device = Device(index=0, type="cuda", name="d", total_memory_bytes=1, free_memory_bytes=1)
    models = tuple(
        NodeModel(
            name=base,
            config_type="llama",
            weights_digest="w",
            size_bytes=1,
            num_parameters=1,
            vocabulary_size=1,
            has_chat_template=False,
        )
        for base in bases
    )
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
        self.placed: dict[str, tuple[Job, str]] = {}

    @rule(priority=st.sampled_from([0, 0, 1]), base=st.sampled_from(_BASES), bound=st.sampled_from(["", "", *_NAMES]))
    def submit(self, priority: int, base: str, bound: str) -> None:
        self.num_made += 1
        job = make_job(
            job_id=f"{self.num_made:026d}", priority=priority, spec=replace(SPEC, base_model=base), create_time=self.now
        )
        self.queue[job.job_id] = QueuedJob(job=job, bound_node=bound)

    @precondition(lambda self: self.placed)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.placed)))
        job, _ = self.placed.pop(job_id)
        if fails:
            waits = replace(job, not_before=self.now + timedelta(seconds=2))
            self.queue[job_id] = QueuedJob(job=waits)

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

    @rule()
    def schedule(self) -> None:
        on_node: dict[str, list[str]] = {}
        for job_id, (_, node) in self.placed.items():
            on_node.setdefault(node, []).append(job_id)
        decision = decide(list(self.queue.values()), list(self.views.values()), jobs_on_node=on_node, now=self.now)
        assigned = dict(decision.assignments)
        assert len(assigned) == len(decision.assignments)
        assert set(decision.places) == set(self.queue)
        assert sorted(place.position for place in decision.places.values()) == list(range(1, len(self.queue) + 1))
        for job_id, node in assigned.items():
            assert self._may_go(self.queue[job_id], node)
            for other_id, other in self.queue.items():
                # First in, first out within a priority.
                if other_id not in assigned and _order(other) < _order(self.queue[job_id]):
                    assert not self._may_go(other, node)
        for job_id, node in assigned.items():
            self.placed[job_id] = (self.queue.pop(job_id).job, node)
        for job_id, queued in self.queue.items():
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
        view, job = self.views[name], queued.job
        wait = None if job.not_before is None else (job.not_before - self.now).total_seconds()
        return (
            view.is_reachable
            and not view.node.draining
            and queued.bound_node in ("", name)
            and view.model(job.spec.base_model) is not None
            and not (wait is not None and 0 < wait <= 60)
        )

    def _num_free(self, name: str) -> int:
        report = self.views[name].report
        assert report is not None
        taken = sum(1 for _, node in self.placed.values() if node == name)
        return len(report.devices) - taken if report.accepting else 0


def _order(queued: QueuedJob) -> tuple[int, str]:
    return -queued.job.priority, queued.job.job_id


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
