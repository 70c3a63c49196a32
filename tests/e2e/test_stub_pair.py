"""The pair without torch: a job's whole way, the queue, cancel, pause, and idempotent starts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.pair import PairUnderTest, wait_for
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import project_service_pb2
from tunesmith_client import InvalidArgument, NotFound

pytestmark = pytest.mark.timeout(180)

QUEUED, RUNNING, PAUSED = event_pb2.JOB_STATE_QUEUED, event_pb2.JOB_STATE_RUNNING, event_pb2.JOB_STATE_PAUSED
SUCCEEDED, CANCELLED = event_pb2.JOB_STATE_SUCCEEDED, event_pb2.JOB_STATE_CANCELLED


def steps(events: list[event_pb2.Event]) -> list[int]:
    return [event.payload.step.step for event in events if event.kind == event_pb2.EVENT_KIND_STEP]


def wait_for_state(pair: PairUnderTest, job_id: str, state: int) -> None:
    wait_for(f"state {state}", lambda: pair.client.jobs.get(job_id).state == state)


def test_a_job_from_upload_to_artifacts(stub_pair: PairUnderTest, tmp_path: Path) -> None:
    job = stub_pair.start("whole", num_steps=5)
    seen = list(stub_pair.client.jobs.watch(job.job_id))
    assert stub_pair.client.jobs.wait(job.job_id).state == SUCCEEDED
    assert seen == stub_pair.log(job.job_id)
    assert steps(seen) == [1, 2, 3, 4, 5]
    assert seen[-1].payload.job_state.state == SUCCEEDED
    names = {artifact.name for artifact in stub_pair.client.artifacts.list(job.job_id)}
    assert names == {"adapter", "report"}
    (adapter,) = stub_pair.client.artifacts.download(job.job_id, "adapter", tmp_path / "adapter")
    assert adapter.read_text() == f"adapter of {job.job_id} after 5 steps"


def test_jobs_run_in_order_and_say_why_they_wait(stub_pair: PairUnderTest, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = stub_pair.start("first", script={"hold_at": "TRAINING", "until_file": str(gate)})
    second, third = stub_pair.start("second"), stub_pair.start("third")
    wait_for_state(stub_pair, first.job_id, RUNNING)

    def positions() -> list[int]:
        return [stub_pair.client.jobs.get(job.job_id).queue_position for job in (first, second, third)]

    wait_for("the queue", lambda: positions() == [0, 1, 2])
    waiting = stub_pair.client.jobs.get(second.job_id)
    assert waiting.state == QUEUED
    assert waiting.wait_reason
    assert waiting.wait_message
    gate.touch()
    jobs = [stub_pair.client.jobs.wait(job.job_id) for job in (first, second, third)]
    starts = [job.start_time.ToNanoseconds() for job in jobs]
    assert starts == sorted(starts)
    ends = [job.end_time.ToNanoseconds() for job in jobs]
    assert ends == sorted(ends)


def test_cancel_of_a_running_and_of_a_queued_job(stub_pair: PairUnderTest, tmp_path: Path) -> None:
    script = {"hold_at": 3, "until_file": str(tmp_path / "never")}
    running = stub_pair.start("running", script=script)
    stub_pair.wait_for_step(running.job_id, 2)
    queued = stub_pair.start("queued")
    assert stub_pair.client.jobs.cancel(queued.job_id).state == CANCELLED
    stub_pair.client.jobs.cancel(running.job_id)
    assert stub_pair.client.jobs.wait(running.job_id, check=False).state == CANCELLED
    kinds = [event.kind for event in stub_pair.log(running.job_id)]
    assert event_pb2.EVENT_KIND_MEMORY_RELEASED in kinds
    assert steps(stub_pair.log(running.job_id)) == [1, 2]
    assert steps(stub_pair.log(queued.job_id)) == []
    # The node is free again.
    assert stub_pair.client.jobs.wait(stub_pair.start("after").job_id).state == SUCCEEDED


def test_pause_frees_the_device_and_resume_goes_on(stub_pair: PairUnderTest) -> None:
    job = stub_pair.start("paused", num_steps=400, script={"step_seconds": 0.02})
    stub_pair.wait_for_step(job.job_id, 3)
    stub_pair.client.jobs.pause(job.job_id)
    wait_for_state(stub_pair, job.job_id, PAUSED)
    # Another job gets the device meanwhile.
    assert stub_pair.client.jobs.wait(stub_pair.start("between").job_id).state == SUCCEEDED
    stub_pair.client.jobs.resume(job.job_id)
    assert stub_pair.client.jobs.wait(job.job_id).state == SUCCEEDED
    events = stub_pair.log(job.job_id)
    assert steps(events) == list(range(1, 401)), "a pause repeats and skips no step"
    assert event_pb2.EVENT_KIND_RESUMED in [event.kind for event in events]


def test_the_same_request_id_gives_the_same_job(stub_pair: PairUnderTest) -> None:
    project = stub_pair.project("once")
    jobs = {stub_pair.client.jobs.start(project.project_id, request_id="one").job_id for _ in range(3)}
    assert len(jobs) == 1
    assert len(list(stub_pair.client.jobs.list())) == 1


def test_a_watch_may_be_opened_before_the_run_and_after_the_end(stub_pair: PairUnderTest, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    holder = stub_pair.start("holder", script={"hold_at": "PLANNING", "until_file": str(gate)})
    job = stub_pair.start("watched")
    early = stub_pair.client.jobs.watch(job.job_id)
    assert next(early).payload.job_state.state == QUEUED
    gate.touch()
    events = list(early)
    assert events[-1].payload.job_state.state == SUCCEEDED
    assert list(stub_pair.client.jobs.watch(job.job_id))[1:] == events
    assert list(stub_pair.client.jobs.watch(job.job_id, after_sequence=events[-2].sequence)) == events[-1:]
    stub_pair.client.jobs.wait(holder.job_id)


def spoil_percentages(project: project_service_pb2.Project) -> None:
    project.traits[0].datasets[0].percentage = 99


def spoil_with_an_absolute_path(project: project_service_pb2.Project) -> None:
    project.output_directory = "/etc"


def spoil_with_dots(project: project_service_pb2.Project) -> None:
    project.output_directory = "../out"


def spoil_rank(project: project_service_pb2.Project) -> None:
    project.hyperparameters.lora.rank = 10**9


def spoil_learning_rate(project: project_service_pb2.Project) -> None:
    project.hyperparameters.optimizer.learning_rate = float("nan")


SPOILERS: tuple[Callable[[project_service_pb2.Project], None], ...] = (
    spoil_percentages,
    spoil_with_an_absolute_path,
    spoil_with_dots,
    spoil_rank,
    spoil_learning_rate,
)


def test_bad_input_is_refused_and_nothing_is_written(stub_pair: PairUnderTest) -> None:
    good = stub_pair.project("good")
    for spoil in SPOILERS:
        project = project_service_pb2.Project(
            name="bad",
            base_model=good.base_model,
            model_type=good.model_type,
            training_type=good.training_type,
            output_directory=good.output_directory,
            traits=good.traits,
        )
        spoil(project)
        with pytest.raises(InvalidArgument) as raised:
            stub_pair.client.projects.create(project)
        assert raised.value.reason, spoil.__name__
    with pytest.raises(NotFound) as missing:
        stub_pair.client.jobs.start(999)
    assert missing.value.reason == "PROJECT_NOT_FOUND"
    assert [project.name for project in stub_pair.client.projects.list()] == ["good"]
    assert list(stub_pair.client.jobs.list()) == []
