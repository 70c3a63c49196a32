"""What survives: a control that dies, a node that falls silent, an engine that is killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from control_service.app.ingest import ingest
from control_service.domain.errors import FailedPrecondition, ResourceExhausted
from control_service.domain.event import JobStateFact, NodeReachabilityFact, StoredEvent
from control_service.domain.failure import Fault
from control_service.domain.job_state import JobState
from control_service.domain.run import RunState, StopMode
from tests.fakes.control_core import quick_config, until
from tests.fakes.control_node import FakeNode, FakeRun
from tests.integration.control_core.conftest import OpenCore


def _assert_whole(log: Sequence[StoredEvent]) -> None:
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    stored = Counter((event.attempt, event.run_sequence) for event in log if event.run_sequence)
    assert max(stored.values()) == 1


async def test_control_restarts_mid_run_and_the_log_is_complete(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    run.step(1)
    await core.until_job(job.job_id, lambda j: j.progress.step == 1)
    await core.close()
    for number in range(2, 30):
        run.step(number)
    run.succeed()
    await core.open()
    done = await core.until_state(job.job_id, JobState.SUCCEEDED)
    assert done.attempt == 1
    log = await core.log(job.job_id)
    _assert_whole(log)
    assert [event.run_sequence for event in log if event.run_sequence] == list(range(1, len(run.events) + 1))
    assert len(node.start_calls) == 1


async def test_control_dies_between_the_choice_and_the_call(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    node.on_start = lambda run: node.set_up(False)  # the run is made, but the answer never arrives
    job = await core.start((await core.project()).project_id)
    await until(lambda: not node.is_up)
    await core.close()
    node.on_start = FakeRun.begin
    node.is_up = True
    node.run(job.job_id).begin()
    await core.open()
    running = await core.running(job.job_id)
    assert running.attempt == 1
    assert len(node.runs) == 1


async def test_events_of_an_older_attempt_are_refused(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    old = node.run(job.job_id)
    old.end(RunState.INTERRUPTED)
    await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING and j.run_cursor > 0)
    before = len(await core.log(job.job_id))
    late = replace(old.events[-1], run_sequence=len(old.events) + 1)
    with pytest.raises(FailedPrecondition) as refused:
        await ingest(job.job_id, 1, [late], store=core.store, codec=core.codec)
    assert refused.value.reason == "STALE_EPOCH"
    assert len(await core.log(job.job_id)) == before


async def test_the_same_batch_twice_is_stored_once(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    await core.until_job(job.job_id, lambda j: j.run_cursor == len(run.events))
    await ingest(job.job_id, 1, run.events, store=core.store, codec=core.codec)
    _assert_whole(await core.log(job.job_id))


async def test_a_killed_engine_is_retried_from_its_last_checkpoint(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    node.run(job.job_id).checkpoint(20, held_out_loss=2.5, best=True)
    node.run(job.job_id).checkpoint(40)
    node.run(job.job_id).fail("ENGINE_KILLED", Fault.HARDWARE)
    again = await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)
    assert (again.num_retries, again.retries_left) == (1, 1)
    resume = node.run(job.job_id, 2).request.resume_from
    assert resume is not None
    assert (resume.checkpoint, resume.attempt) == ("step-00000040", 1)
    listed = await core.store.read(lambda tx: tx.checkpoints.list_for_job(job.job_id))
    assert [(known.probe_loss, known.held_out_loss, known.best) for known in listed] == [
        (1.5, 2.5, True),
        (1.5, None, False),
    ]


async def test_a_failure_is_told_once_and_kept_until_the_next_attempt_runs(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    node.start_error = ResourceExhausted("NODE_BUSY", "no memory is free")
    node.run(job.job_id).fail("ENGINE_KILLED", Fault.HARDWARE)
    # Refused by a busy node, it goes back to the queue, and still says what it failed of before.
    waiting = await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.QUEUED)
    assert waiting.failure is not None
    assert waiting.failure.reason == "ENGINE_KILLED"
    node.start_error = None
    again = await core.until_job(job.job_id, lambda j: j.state is JobState.RUNNING)
    assert again.failure is None
    told = [fact for fact in await core.facts(job.job_id) if isinstance(fact, JobStateFact) and fact.failure]
    assert [(fact.previous_state, fact.state) for fact in told] == [(JobState.RUNNING, JobState.QUEUED)]


async def test_a_new_attempt_does_not_show_the_progress_of_the_last(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    node.run(job.job_id).step(55)
    await core.until_job(job.job_id, lambda j: j.progress.step == 55)
    node.run(job.job_id).fail("ENGINE_KILLED", Fault.HARDWARE)
    again = await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)
    assert (again.progress.step, again.progress.loss, again.progress.remaining_seconds) == (0, None, 0.0)


async def test_what_trying_again_cannot_mend_fails_at_once(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    node.run(job.job_id).fail("TRAINING")
    failed = await core.until_state(job.job_id, JobState.FAILED)
    assert failed.attempt == 1
    assert failed.failure is not None
    assert failed.failure.reason == "TRAINING"


async def test_retries_are_used_up(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id, max_retries=1)
    for attempt in (1, 2):
        await until(lambda key=(job.job_id, attempt): key in node.runs)  # type: ignore[misc]
        node.run(job.job_id, attempt).fail("ENGINE_EXITED")
    failed = await core.until_state(job.job_id, JobState.FAILED)
    assert failed.failure is not None
    assert failed.failure.reason == "RETRIES_EXHAUSTED"
    assert failed.failure.details["last_reason"] == "ENGINE_EXITED"


async def test_a_silent_node_leaves_the_job_running_and_the_same_attempt_goes_on(open_core: OpenCore) -> None:
    node = FakeNode("a")
    config = quick_config()
    core = await open_core(node, config=replace(config, nodes=replace(config.nodes, lease_seconds=0.3)))
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    node.set_up(False)
    lost = await core.until_job(job.job_id, lambda j: j.node_unreachable)
    assert lost.state is JobState.RUNNING
    node.run(job.job_id).step(3)
    node.set_up(True)
    back = await core.until_job(job.job_id, lambda j: not j.node_unreachable and j.progress.step == 3)
    assert (back.state, back.attempt) == (JobState.RUNNING, 1)
    told = [fact.reachable for fact in await core.facts(job.job_id) if isinstance(fact, NodeReachabilityFact)]
    assert told == [False, True]


async def test_a_lost_job_goes_on_elsewhere_and_the_first_run_is_stopped(open_core: OpenCore) -> None:
    first, second = FakeNode("a"), FakeNode("b")
    config = quick_config()
    core = await open_core(first, second, config=replace(config, nodes=replace(config.nodes, lease_seconds=0.3)))
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    assert (await core.running(job.job_id)).node == "a"
    first.run(job.job_id).checkpoint(20)
    checkpoint = first.run(job.job_id).events[-1]
    await core.until_job(job.job_id, lambda j: j.run_cursor == checkpoint.run_sequence)
    await until(lambda: len(core.blobs.blobs) == 2)  # the data set and the replicated checkpoint
    first.set_up(False)
    moved = await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)
    assert moved.node == "b"
    resume = second.run(job.job_id, 2).request.resume_from
    assert resume is not None
    assert resume.step == 20
    assert {file.sha256 for file in resume.files} <= second.blobs.keys()
    first.set_up(True)
    await until(lambda: first.run(job.job_id).is_over)
    assert (await core.view(job.job_id)).job.state is JobState.RUNNING
    _assert_whole(await core.log(job.job_id))


@pytest.mark.parametrize("is_saved", [True, False], ids=["saved", "not-saved"])
async def test_a_job_whose_artifacts_are_lost_with_their_node_goes_on_from_its_last_checkpoint(
    open_core: OpenCore, is_saved: bool
) -> None:
    first, second = FakeNode("a"), FakeNode("b")
    config = quick_config()
    core = await open_core(first, second, config=replace(config, nodes=replace(config.nodes, lease_seconds=0.3)))
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    assert (await core.running(job.job_id)).node == "a"
    run = first.run(job.job_id)
    if is_saved:
        run.checkpoint(20)
        await until(lambda: len(core.blobs.blobs) == 2)  # the data set and the replicated checkpoint
    # It is trained, and its bytes do not come.
    first.reads_blobs = False
    run.succeed()
    await core.until_job(job.job_id, lambda j: j.run_state is RunState.SUCCEEDED)
    first.set_up(False)
    lost = await core.until_job(job.job_id, lambda j: j.node_unreachable or j.attempt == 2)
    if is_saved:
        moved = await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)
        assert moved.node == "b"
        resume = second.run(job.job_id, 2).request.resume_from
        assert resume is not None
        assert resume.step == 20
        second.run(job.job_id, 2).succeed()
    else:
        # All of the training would be done again; what it came to is waited for.
        assert lost.attempt == 1
        first.reads_blobs = True
        first.set_up(True)
    done = await core.until_state(job.job_id, JobState.SUCCEEDED)
    assert (done.attempt, done.node) == ((2, "b") if is_saved else (1, "a"))
    _assert_whole(await core.log(job.job_id))


async def test_artifacts_that_cannot_be_had_fail_the_job_typed(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    file = run.node.add_file(b"adapter", "adapter_model.safetensors")
    node.blobs[file.sha256] = b"damaged"
    run.succeed(b"adapter")
    node.blobs[file.sha256] = b"damaged"
    failed = await core.until_state(job.job_id, JobState.FAILED)
    assert failed.failure is not None
    assert (failed.failure.reason, failed.failure.stage) == ("COLLECTING", "COLLECTING")
    assert failed.failure.details["cause"] == "CHECKSUM_MISMATCH"
    assert core.blobs.outputs == {}
    assert node.released == []


async def test_a_refusal_at_dispatch_fails_the_job_with_the_same_reason(open_core: OpenCore) -> None:
    node = FakeNode("a")
    node.is_up = False
    node.start_error = FailedPrecondition("CHAT_TEMPLATE_MISSING", "no template", details={"fault": "USER"})
    core = await open_core(node)
    job = await core.start((await core.project()).project_id)
    node.set_up(True)
    failed = await core.until_state(job.job_id, JobState.FAILED)
    assert failed.failure is not None
    assert (failed.failure.reason, failed.failure.fault) == ("CHAT_TEMPLATE_MISSING", Fault.USER)


def _spoil(run: FakeRun) -> None:
    """Makes the run's newest event unreadable."""
    run.events[-1] = replace(run.events[-1], payload=b"\xff not a payload")


async def test_an_event_that_cannot_be_read_keeps_its_place_and_stops_nothing(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    run.step(1)
    _spoil(run)
    run.step(2)
    run.succeed()
    await core.until_state(job.job_id, JobState.SUCCEEDED)
    log = await core.log(job.job_id)
    _assert_whole(log)
    assert [event.payload for event in log if event.run_sequence == 5] == [b""]
    assert await core.watch(job.job_id) == log


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED])
async def test_an_outcome_that_cannot_be_read_is_the_nodes_word(open_core: OpenCore, state: RunState) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    if state is RunState.SUCCEEDED:
        run.succeed()
    else:
        run.fail("TRAINING")
    _spoil(run)
    done = await core.until_job(job.job_id, lambda j: j.is_over)
    assert done.state.value == state.value
    assert (done.failure.reason if done.failure else "") == ("" if state is RunState.SUCCEEDED else "TRAINING")
    assert (await core.log(job.job_id))[-1].run_sequence == 0


async def test_an_artifact_that_cannot_be_read_fails_the_job(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    run = node.run(job.job_id)
    run.succeed()
    run.events[-2] = replace(run.events[-2], payload=b"\xff not a payload")
    failed = await core.until_state(job.job_id, JobState.FAILED)
    assert failed.failure is not None
    assert failed.failure.reason == "COLLECTING"


@pytest.mark.parametrize("reason", ["STALE_EPOCH", "RUN_CONFLICT"])
async def test_attempts_go_on_above_those_that_only_the_node_remembers(open_core: OpenCore, reason: str) -> None:
    # Control was restored from a backup; the node has had, and released, later attempts.
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    node.start_error = FailedPrecondition(reason, "attempt 7 is known", details={"highest_attempt": "7"})
    job_id = (await core.start((await core.project()).project_id)).job_id
    await core.until_job(job_id, lambda job: len(node.start_calls) == 1 and job.state is JobState.QUEUED)
    node.start_error = None
    job = await core.until_state(job_id, JobState.RUNNING)
    assert job.attempt == 8
    assert [call.key.attempt for call in node.start_calls] == [1, 8]
    assert job.num_retries == 0


async def test_an_attempt_rises_above_the_runs_that_nodes_report(open_core: OpenCore) -> None:
    a, b = FakeNode("a"), FakeNode("b")
    core = await open_core(a, b)
    await core.reachable()
    job_id = (await core.start((await core.project()).project_id)).job_id
    await core.running(job_id)
    # A later attempt, dispatched by a control that nobody remembers, goes on elsewhere.
    request = a.run(job_id).request
    b.runs[job_id, 4] = FakeRun(b, replace(request, key=replace(request.key, attempt=4)))
    b.runs[job_id, 4].begin()
    await until(lambda: b.runs[job_id, 4].stops == [StopMode.CANCEL])
    a.run(job_id).fail("ENGINE_KILLED")
    job = await core.until_job(job_id, lambda job: job.attempt > 1 and job.state is JobState.RUNNING)
    assert job.attempt == 5
