"""With ten thousand jobs waiting, what is read and looked at for one of them is what it is with ten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from control_service.adapters.sql import job_repositories, schema
from control_service.adapters.sql.records import job_to_row
from control_service.app.jobs import list_jobs
from control_service.app.store_ports import Transaction
from control_service.app.training import retry_job
from control_service.domain.errors import Unavailable
from control_service.domain.job import Job, WaitReason
from control_service.domain.job_state import JobState
from control_service.domain.queue_policy import QueueWalk
from tests.fakes.control_core import Core, until
from tests.fakes.control_node import FakeNode

NUM_JOBS = 10_000
# Far more than one job needs with all that its move wakes, far fewer than there are.
FEW = 150


class Counter:
    """Job records that were read, and jobs that the queue policy looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for owner, name in (
            (job_repositories, "job_from_row"),
            (QueueWalk, "take"),
            (QueueWalk, "place"),
        ):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self.count += 1
            return function(*arguments)

        return counted

    @contextmanager
    def few(self, most: int = FEW) -> Iterator[None]:
        before = self.count
        yield
        assert self.count - before <= most


async def _fill(core: Core, template: Job) -> list[str]:
    """Puts jobs into the queue behind the service's back, oldest first; it is begun anew."""
    ids = [core.ids.new_id() for _ in range(NUM_JOBS)]
    waiting = replace(
        template, state=JobState.QUEUED, attempt=0, node="", run_state=None, run_cursor=0, progress=template.progress
    )

    def work(tx: Transaction) -> None:
        connection: Any = tx.jobs._connection  # type: ignore[attr-defined]
        rows = [{**job_to_row(replace(waiting, job_id=job_id)), "last_sequence": 0} for job_id in ids]
        connection.execute(sa.insert(schema.jobs), rows)

    await core.store.transact(work)
    await core.restart()
    await core.reachable()
    return ids


async def test_a_place_in_a_long_queue_costs_what_it_costs_in_a_short_one(
    open_core: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch)
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    running = await core.running((await core.start(project.project_id)).job_id)
    waiting = await _fill(core, running)
    assert (await core.view(waiting[0])).queue_position == 1

    with counter.few():
        view = await core.view(waiting[4_999])
    assert (view.queue_position, view.wait_reason) == (5_000, WaitReason.QUEUE)
    with counter.few():
        page = await list_jobs(store=core.store, queue=core.runtime.queue, limit=50)
    assert [view.queue_position for view in page] == list(range(NUM_JOBS, NUM_JOBS - 50, -1))
    with counter.few():
        last = await core.start(project.project_id)
        assert (await core.view(last.job_id)).queue_position == NUM_JOBS + 1
        first = await core.start(project.project_id, priority=1)
        assert (await core.view(first.job_id)).queue_position == 1
        await core.cancel(waiting[0])
        assert (await core.view(waiting[1])).queue_position == 2
    with counter.few():
        for step in range(1, 101):
            node.run(running.job_id).step(step)
        await core.until_job(running.job_id, lambda job: job.progress.step == 100, seconds=60.0)
    with counter.few():
        node.run(running.job_id).succeed()
        await core.until_state(first.job_id, JobState.RUNNING)
        node.run(first.job_id).succeed()
        await core.until_state(waiting[1], JobState.RUNNING)
    assert (await core.view(last.job_id)).queue_position == NUM_JOBS - 1


async def test_what_moved_while_the_database_could_not_be_read_is_read_later(open_core: Any) -> None:
    core = await open_core()
    project = await core.project()
    first = await core.start(project.project_id)
    read = core.store.read
    refusals = 0

    async def refuse(work: Any) -> Any:
        nonlocal refusals
        refusals += 1
        raise Unavailable("STORE_UNAVAILABLE", "not now", retry_after_seconds=1.0)

    core.store.read = refuse
    with pytest.raises(Unavailable):
        await core.start(project.project_id)
    await core.cancel(first.job_id)
    await until(lambda: refusals > 1)
    core.store.read = read
    second = await core.start(project.project_id)
    assert (await core.view(second.job_id)).queue_position == 1


async def test_what_is_stored_is_answered_though_its_place_cannot_be_read(open_core: Any) -> None:
    core = await open_core()
    project = await core.project()
    over = await core.start(project.project_id)
    await core.cancel(over.job_id)
    read = core.store.read

    async def refuse(work: Any) -> Any:
        raise Unavailable("STORE_UNAVAILABLE", "not now", retry_after_seconds=1.0)

    core.store.read = refuse
    view = await retry_job(
        over.job_id, store=core.store, queue=core.runtime.queue, clock=core.clock, ids=core.ids, codec=core.codec
    )
    assert (view.job.state, view.queue_position, view.wait_reason) == (JobState.QUEUED, 0, WaitReason.UNSPECIFIED)
    # Who asks for the place alone hears why there is none.
    with pytest.raises(Unavailable):
        await core.runtime.queue.view_of(view.job)
    core.store.read = read
    assert (await core.view(view.job.job_id)).queue_position == 1
