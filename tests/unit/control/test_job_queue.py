"""The queue of a store: what is chosen when more is committed while it is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

from control_service.app.queue import Choice, JobQueue
from control_service.app.store_ports import CommitNotice
from control_service.domain.artifact import Checkpoint
from control_service.domain.job import Job, WaitReason
from control_service.domain.job_state import JobState
from control_service.domain.node import Device, Node, NodeCapabilities, NodeReport, NodeState, NodeView
from control_service.domain.run import RunState
from tests.fakes.control_clock import FakeClock
from tests.fakes.control_jobs import NOW, SPEC, make_job, make_node_model

T = TypeVar("T")

_MODEL = make_node_model(SPEC.base_model)
_DEVICE = Device(index=0, type="cuda", name="d", total_memory_bytes=1, free_memory_bytes=1)
_NODE = NodeView(
    node=Node(name="a", address="x:1", create_time=NOW),
    state=NodeState.REACHABLE,
    report=NodeReport(node_name="a", instance_id="1", devices=(_DEVICE,)),
    capabilities=NodeCapabilities(node_name="a", instance_id="1", models=(_MODEL,)),
)


class _Jobs:
    """A store of jobs, and its transaction; reads wait while the gate is closed, and say so."""

    def __init__(self) -> None:
        self.jobs = self.checkpoints = self
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_read = asyncio.Event()
        self._jobs: dict[str, Job] = {}
        self._listeners: list[Callable[[CommitNotice], None]] = []

    def subscribe(self, listener: Callable[[CommitNotice], None]) -> None:
        self._listeners.append(listener)

    async def read(self, work: Callable[[Any], T]) -> T:
        self.is_read.set()
        await self.gate.wait()
        return work(self)

    def put(self, job: Job) -> Job:
        self._jobs[job.job_id] = job
        moved = frozenset({job.job_id})
        for listener in self._listeners:
            listener(CommitNotice(job_sequences={}, jobs_changed=True, nodes_changed=False, moved_jobs=moved))
        return job

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def list_page(self, **_: Any) -> Sequence[Job]:
        return [job for _, job in sorted(self._jobs.items(), reverse=True)]

    def list_for_job(self, job_id: str) -> Sequence[Checkpoint]:
        return ()


class _Nodes:
    def views(self) -> Sequence[NodeView]:
        return [_NODE]


def _job(number: int, **changes: Any) -> Job:
    return make_job(job_id=f"{number:026d}", **changes)


async def test_a_back_off_that_begins_while_the_queue_is_read_keeps_nobody_waiting() -> None:
    store, clock = _Jobs(), FakeClock()
    store_port: Any = store
    nodes: Any = _Nodes()
    queue = JobQueue(store=store_port, nodes=nodes, clock=clock)
    waits = store.put(_job(2))
    assert (await queue.choose()).assignments == [(waits.job_id, "a")]
    store.put(_job(3))
    store.gate.clear()
    store.is_read.clear()
    reading = asyncio.create_task(queue.view_of(waits))
    await store.is_read.wait()
    has_begun = asyncio.Event()

    async def choose() -> Choice:
        has_begun.set()
        return await queue.choose()

    choosing = asyncio.create_task(choose())
    await has_begun.wait()
    clock.advance(0.003)
    ends = clock.steady_utc_now() + timedelta(seconds=60)
    rests = store.put(_job(1, attempt=7, not_before=ends))
    store.gate.set()
    async with asyncio.timeout(30.0):
        await reading
        choice = await choosing
        assert (choice.assignments, choice.next_time) == ([(waits.job_id, "a")], ends)
        clock.advance(30.0)
        assert (await queue.choose()) == choice
        assert (await queue.view_of(rests)).wait_reason is WaitReason.BACK_OFF
        clock.advance(30.0)
        choice = await queue.choose()
    assert (choice.assignments, choice.next_time) == ([(rests.job_id, "a")], None)


async def test_a_lost_job_whose_run_has_succeeded_is_chosen_no_more() -> None:
    store, nodes = _Jobs(), _Nodes()
    store_port: Any = store
    nodes_port: Any = nodes
    queue = JobQueue(store=store_port, nodes=nodes_port, clock=FakeClock())
    lost = store.put(_job(1, state=JobState.RUNNING, attempt=1, node="lost", node_unreachable=True))
    assert (await queue.choose()).assignments == [(lost.job_id, "a")]
    store.put(replace(lost, run_state=RunState.SUCCEEDED))
    assert (await queue.choose()).assignments == []
