"""Jobs whose memory is more than a node's devices have: they go to another node, or wait, or fail with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from control_service.app.ports import PlanLevel
from control_service.app.training import plan_training
from control_service.domain.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from control_service.domain.event import JobStateFact
from control_service.domain.failure import Fault
from control_service.domain.job_state import JobState
from tests.fakes.control_node import FakeNode

TOO_SMALL = FailedPrecondition("DOES_NOT_FIT", "the run needs about 90,000 bytes and the device has 80,000")


async def test_a_job_goes_where_it_fits(open_core: Any) -> None:
    small, large = FakeNode("a"), FakeNode("b")
    small.start_error = TOO_SMALL
    core = await open_core(small, large)
    await core.reachable()
    project = await core.project()
    running = await core.running((await core.start(project.project_id)).job_id)

    assert (running.node, running.num_retries) == ("b", 0)
    assert len(small.start_calls) == 1
    states = [fact for fact in await core.facts(running.job_id) if isinstance(fact, JobStateFact)]
    assert "node a: the run needs about" in next(fact.message for fact in states[1:] if fact.state is JobState.QUEUED)


async def test_a_job_that_fits_only_a_busy_node_waits_for_it(open_core: Any) -> None:
    small, large = FakeNode("a"), FakeNode("b")
    core = await open_core(small, large)
    await core.reachable()
    project = await core.project()
    first = [await core.running((await core.start(project.project_id)).job_id) for _ in range(2)]
    on_large = next(job for job in first if job.node == "b")
    small.start_error = TOO_SMALL
    waiting = await core.start(project.project_id)
    small.run(next(job.job_id for job in first if job.node == "a")).succeed(b"adapter")
    # Dispatched and refused, which may be over before anybody looks.
    await core.until_job(waiting.job_id, lambda job: job.attempt == 1 and job.state is JobState.QUEUED)
    view = await core.view(waiting.job_id)
    assert view.wait_reason.value in ("NODE_BUSY", "QUEUE")
    assert "node b" in view.wait_message
    large.run(on_large.job_id).succeed(b"adapter")
    assert (await core.running(waiting.job_id)).node == "b"


async def test_a_job_that_waits_for_memory_of_the_host_leaves_the_node_to_others(open_core: Any) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    node.start_error = ResourceExhausted(
        "NODE_BUSY", "other runs hold it", details={"retry_after_seconds": "30"}, retry_after_seconds=30.0
    )
    start = core.clock.steady_utc_now()
    waiting = (await core.start(project.project_id)).job_id
    refused = await core.until_job(waiting, lambda job: job.attempt == 1 and job.state is JobState.QUEUED)
    assert (refused.not_before - start).total_seconds() >= 30
    states = [fact for fact in await core.facts(waiting) if isinstance(fact, JobStateFact)]
    assert states[-1].message == "node a: NODE_BUSY: other runs hold it"
    (view,) = core.runtime.nodes.views()
    assert view.report.accepting
    node.start_error = None
    running = await core.running((await core.start(project.project_id)).job_id)
    assert (running.node, len(node.start_calls)) == ("a", 2)


async def test_a_job_that_fits_nowhere_fails(open_core: Any) -> None:
    nodes = [FakeNode("a"), FakeNode("b")]
    core = await open_core(*nodes)
    await core.reachable()
    project = await core.project()
    for node in nodes:
        node.start_error = TOO_SMALL
    job = await core.start(project.project_id)
    failed = await core.until_state(job.job_id, JobState.FAILED)
    assert failed.failure is not None
    assert failed.failure.reason == "DOES_NOT_FIT"
    assert [len(node.start_calls) for node in nodes] == [1, 1]


async def test_a_run_whose_exact_plan_does_not_fit_goes_to_another_node(open_core: Any) -> None:
    """The node took it, counted its tokens, and failed it."""
    small, large = FakeNode("a"), FakeNode("b")
    core = await open_core(small, large)
    await core.reachable()
    project = await core.project()
    job = await core.running((await core.start(project.project_id)).job_id)
    assert job.node == "a"
    small.run(job.job_id).fail("DOES_NOT_FIT", Fault.USER)
    moved = await core.until_job(job.job_id, lambda job: job.node == "b" and job.state is JobState.RUNNING)

    assert (moved.attempt, moved.num_retries, moved.failure) == (2, 0, None)
    assert len(small.start_calls) == 1
    large.run(job.job_id, 2).fail("DOES_NOT_FIT", Fault.USER)
    failed = await core.until_state(job.job_id, JobState.FAILED)
    assert failed.failure is not None
    assert (failed.failure.reason, failed.num_retries) == ("DOES_NOT_FIT", 0)


async def test_planning_asks_the_next_node(open_core: Any) -> None:
    small, large = FakeNode("a"), FakeNode("b")
    small.plan_error = TOO_SMALL
    core = await open_core(small, large)
    await core.reachable()
    project = await core.project()
    ports = {"store": core.store, "nodes": core.runtime.nodes, "blobs": core.blobs, "clock": core.clock}
    planned = await plan_training(project.project_id, probe_memory=True, **ports)
    assert planned.node == "b"
    assert planned.plan["memory_probe"] == {"peak_bytes": "7"}
    assert (await core.start(project.project_id)).state is JobState.QUEUED

    large.plan_error = ResourceExhausted("NODE_BUSY", "device cpu:-1 is taken")
    with pytest.raises(FailedPrecondition, match="DOES_NOT_FIT"):
        await plan_training(project.project_id, probe_memory=True, **ports)
    with pytest.raises(InvalidArgument, match="probe_memory"):
        await plan_training(project.project_id, level=PlanLevel.CHECK, probe_memory=True, **ports)
