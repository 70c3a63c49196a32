"""Jobs from the request to the end, over the real database and fake nodes."""

from __future__ import annotations

from control_service.app import artifacts
from control_service.domain.event import ArtifactFact, JobStateFact, PhaseFact
from control_service.domain.job import WaitReason
from control_service.domain.job_state import JobState
from control_service.domain.run import Phase, RunState
from tests.fakes.control_core import until
from tests.fakes.control_node import FakeNode
from tests.integration.control_core.conftest import OpenCore


async def test_a_job_runs_to_its_collected_artifacts(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    job = await core.start(project.project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    run.step(1)
    run.succeed(b"weights of the adapter")
    done = await core.until_state(job.job_id, JobState.SUCCEEDED)

    assert done.output_path == f"out/{job.job_id}"
    assert core.blobs.outputs[f"out/{job.job_id}/adapter"] == {"adapter_model.safetensors": b"weights of the adapter"}
    assert done.progress.step == 1
    assert done.weights_digest == "w" * 64
    log = await core.log(job.job_id)
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    states = [fact.state for fact in await core.facts(job.job_id) if isinstance(fact, JobStateFact)]
    assert states == [JobState.QUEUED, JobState.DISPATCHING, JobState.RUNNING, JobState.SUCCEEDED]
    facts = await core.facts(job.job_id)
    assert PhaseFact(phase=Phase.COLLECTING) in facts
    assert [fact.collected for fact in facts if isinstance(fact, ArtifactFact)] == [False, True]
    assert [a.name for a in await artifacts.list_artifacts(job.job_id, store=core.store)] == ["adapter"]
    await until(lambda: [key.job_id for key in node.released] == [job.job_id])


async def test_jobs_run_in_order_and_say_why_they_wait(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    first = await core.start(project.project_id)
    await core.running(first.job_id)
    second = await core.start(project.project_id)
    third = await core.start(project.project_id)
    urgent = await core.start(project.project_id, priority=5)

    views = [await core.view(job.job_id) for job in (urgent, second, third)]
    assert [view.queue_position for view in views] == [1, 2, 3]
    assert [view.wait_reason for view in views] == [WaitReason.NODE_BUSY, WaitReason.QUEUE, WaitReason.QUEUE]
    assert first.job_id in views[0].wait_message

    order = []
    for expected in (first, urgent, second, third):
        await core.running(expected.job_id)
        order.append(expected.job_id)
        node.run(expected.job_id).succeed(expected.job_id.encode())
        await core.until_state(expected.job_id, JobState.SUCCEEDED)
    assert [request.key.job_id for request in node.start_calls] == order


async def test_a_job_waits_for_a_node_and_starts_when_one_comes(open_core: OpenCore) -> None:
    node = FakeNode("a")
    node.is_up = False
    core = await open_core(node)
    project = await core.project()
    job = await core.start(project.project_id)
    assert (await core.view(job.job_id)).wait_reason is WaitReason.NO_NODE
    node.set_up(True)
    await core.running(job.job_id)


async def test_two_nodes_take_a_job_each(open_core: OpenCore) -> None:
    core = await open_core(FakeNode("a"), FakeNode("b"))
    await core.reachable()
    project = await core.project()
    jobs = [await core.start(project.project_id) for _ in range(2)]
    nodes = {(await core.running(job.job_id)).node for job in jobs}
    assert nodes == {"a", "b"}


async def test_a_busy_node_sends_the_job_back_and_counts_nothing(open_core: OpenCore) -> None:
    from control_service.domain.errors import ResourceExhausted

    node = FakeNode("a")
    node.start_error = ResourceExhausted("NODE_BUSY", "no memory is free")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    job = await core.start(project.project_id)
    await until(lambda: len(node.start_calls) >= 1)
    node.start_error = None
    running = await core.running(job.job_id)
    assert running.num_retries == 0
    assert JobState.QUEUED in [f.state for f in (await core.facts(job.job_id))[1:] if isinstance(f, JobStateFact)]


async def test_interrupted_goes_back_to_the_queue_and_resumes_without_a_retry(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    job = await core.start(project.project_id)
    await core.running(job.job_id)
    node.run(job.job_id).checkpoint(20)
    node.run(job.job_id).end(RunState.INTERRUPTED)
    again = await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)
    assert again.num_retries == 0
    resume = node.run(job.job_id, 2).request.resume_from
    assert resume is not None
    assert (resume.checkpoint, resume.step, resume.attempt) == ("step-00000020", 20, 1)


async def test_paused_and_resumed(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    job = await core.start(project.project_id)
    await core.running(job.job_id)
    assert (await core.pause(job.job_id)).state is JobState.PAUSING
    paused = await core.until_state(job.job_id, JobState.PAUSED)
    assert paused.phase is Phase.UNSPECIFIED
    await core.resume(job.job_id)
    await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)
    assert node.run(job.job_id, 2).request.resume_from is not None
