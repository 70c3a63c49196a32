"""Each process of the pair is killed with SIGKILL while a job trains; the log stays complete and the job ends well."""

import pytest

from tests.fakes.pair import PairUnderTest, wait_for
from tunesmith.common.v1 import errors_pb2, event_pb2
from tunesmith_client import JobFailed

pytestmark = pytest.mark.timeout(240)

QUEUED, SUCCEEDED, FAILED = event_pb2.JOB_STATE_QUEUED, event_pb2.JOB_STATE_SUCCEEDED, event_pb2.JOB_STATE_FAILED
# Long enough that a kill lands in the middle of training.
NUM_STEPS = 300
SLOW = {"step_seconds": 0.03}


def steps(events: list[event_pb2.Event]) -> list[int]:
    return [event.payload.step.step for event in events if event.kind == event_pb2.EVENT_KIND_STEP]


def test_control_is_killed_and_training_goes_on(stub_pair: PairUnderTest) -> None:
    job = stub_pair.start("control-dies", num_steps=NUM_STEPS, script=SLOW)
    watch = stub_pair.client.jobs.watch(job.job_id)
    seen = [next(watch)]
    while seen[-1].kind != event_pb2.EVENT_KIND_STEP or seen[-1].payload.step.step < 5:
        seen.append(next(watch))
    (engine,) = stub_pair.engines()
    stub_pair.pair.control.kill()
    assert engine.is_running(), "nothing of the GPU side noticed"
    stub_pair.restart_control()
    # The watch that was open goes on by itself.
    seen += list(watch)
    assert stub_pair.client.jobs.get(job.job_id).state == SUCCEEDED
    assert stub_pair.client.jobs.get(job.job_id).attempt == 1
    assert seen == stub_pair.log(job.job_id)
    assert steps(seen) == list(range(1, NUM_STEPS + 1))


def test_the_end_is_recorded_even_while_control_is_down(stub_pair: PairUnderTest) -> None:
    job = stub_pair.start("ends-alone", num_steps=60, script=SLOW)
    stub_pair.wait_for_step(job.job_id, 3)
    stub_pair.pair.control.kill()
    artifacts = stub_pair.node_directory / "runs" / job.job_id / "1" / "artifacts" / "manifest.json"
    wait_for("the run's artifacts", artifacts.exists)
    stub_pair.restart_control()
    assert stub_pair.client.jobs.wait(job.job_id).attempt == 1
    assert steps(stub_pair.log(job.job_id)) == list(range(1, 61))


def test_the_gpu_server_is_killed_and_its_engine_is_adopted(stub_pair: PairUnderTest) -> None:
    job = stub_pair.start("gpu-dies", num_steps=NUM_STEPS, script=SLOW)
    stub_pair.wait_for_step(job.job_id, 5)
    (engine,) = stub_pair.engines()
    stub_pair.pair.gpu.kill()
    assert engine.is_running()
    stub_pair.restart_gpu()
    ended = stub_pair.client.jobs.wait(job.job_id)
    assert (ended.state, ended.attempt) == (SUCCEEDED, 1)
    assert steps(stub_pair.log(job.job_id)) == list(range(1, NUM_STEPS + 1))
    # Adopted, not replaced.
    assert [process.pid for process in stub_pair.engines()] in ([engine.pid], [])


def test_the_engine_is_killed_and_the_next_attempt_goes_on_from_the_checkpoint(stub_pair: PairUnderTest) -> None:
    job = stub_pair.start("engine-dies", num_steps=120, save_every_steps=10, script=SLOW)
    stub_pair.wait_for_step(job.job_id, 25)
    stub_pair.kill_engine()
    ended = stub_pair.client.jobs.wait(job.job_id)
    assert (ended.state, ended.attempt) == (SUCCEEDED, 2)
    events = stub_pair.log(job.job_id)
    returns = [
        event.payload.job_state
        for event in events
        if event.kind == event_pb2.EVENT_KIND_JOB_STATE and event.payload.job_state.state == QUEUED
    ]
    # The first is the job's own beginning.
    assert [change.HasField("failure") for change in returns] == [False, True]
    assert returns[1].failure.reason == errors_pb2.ERROR_REASON_ENGINE_KILLED
    assert returns[1].failure.signal == 9
    (resumed,) = [event.payload.resumed for event in events if event.kind == event_pb2.EVENT_KIND_RESUMED]
    assert resumed.from_step >= 20
    assert resumed.from_step % 10 == 0
    second = [event for event in events if event.attempt == 2]
    assert steps(second) == list(range(resumed.from_step + 1, 121))


def test_without_retries_the_failure_is_the_jobs_and_a_retry_is_a_new_job(stub_pair: PairUnderTest) -> None:
    job = stub_pair.start("no-retries", num_steps=80, script=SLOW, max_retries=0)
    stub_pair.wait_for_step(job.job_id, 3)
    stub_pair.kill_engine()
    with pytest.raises(JobFailed) as raised:
        stub_pair.client.jobs.wait(job.job_id)
    assert (raised.value.reason, raised.value.state) == ("ENGINE_KILLED", "FAILED")
    retried = stub_pair.client.jobs.retry(job.job_id)
    assert retried.retry_of_job_id == job.job_id
    assert stub_pair.client.jobs.wait(retried.job_id).state == SUCCEEDED
    assert stub_pair.client.jobs.get(job.job_id).state == FAILED, "terminal means terminal"
