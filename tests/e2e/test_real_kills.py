"""Real training survives the death of each process of the pair: a whole log, and the losses of a quiet run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.pair import PairUnderTest, running_pair
from tests.fakes.tiny_models import place
from tunesmith.common.v1 import errors_pb2, event_pb2, training_spec_pb2

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

NUM_STEPS = 240
SAVE_EVERY_STEPS = 20


@pytest.fixture
def tiny_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PairUnderTest]:
    """Both services with the real engine, and a tiny random llama as the base."""
    # Equal bit for bit only when sums are made in one order.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base_model = place(tmp_path / "models")
    with running_pair(tmp_path / "data", tmp_path / "models", base_model) as pair:
        yield pair


def losses(events: list[event_pb2.Event]) -> dict[int, float]:
    """Loss by step; what a later attempt trained again replaces what was lost."""
    found: dict[int, float] = {}
    for event in events:
        if event.kind == event_pb2.EVENT_KIND_STEP:
            found[event.payload.step.step] = event.payload.step.loss
    return found


def test_the_losses_after_three_kills_are_those_of_an_uninterrupted_run(tiny_pair: PairUnderTest) -> None:
    project = tiny_pair.project(
        "kills",
        num_steps=NUM_STEPS,
        save_every_steps=SAVE_EVERY_STEPS,
        training_type="qlora",
        max_length=64,
        batch=training_spec_pb2.Batch(examples=4),
        lora=training_spec_pb2.Lora(rank=4, dropout=0.1),
    )
    quiet = tiny_pair.client.jobs.start(project.project_id)
    tiny_pair.client.jobs.wait(quiet.job_id)
    expected = losses(tiny_pair.log(quiet.job_id))
    assert list(expected) == list(range(1, NUM_STEPS + 1))

    job = tiny_pair.client.jobs.start(project.project_id)
    tiny_pair.wait_for_step(job.job_id, 5)
    tiny_pair.pair.control.kill()
    tiny_pair.restart_control()
    tiny_pair.pair.gpu.kill()
    tiny_pair.restart_gpu()
    tiny_pair.wait_for_step(job.job_id, SAVE_EVERY_STEPS + 5)
    tiny_pair.kill_engine()
    ended = tiny_pair.client.jobs.wait(job.job_id)

    assert (ended.state, ended.attempt) == (event_pb2.JOB_STATE_SUCCEEDED, 2)
    events = tiny_pair.log(job.job_id)
    failures = [
        event.payload.job_state.failure.reason
        for event in events
        if event.kind == event_pb2.EVENT_KIND_JOB_STATE and event.payload.job_state.HasField("failure")
    ]
    assert failures[0] == errors_pb2.ERROR_REASON_ENGINE_KILLED
    (resumed,) = [event.payload.resumed for event in events if event.kind == event_pb2.EVENT_KIND_RESUMED]
    assert resumed.from_step >= SAVE_EVERY_STEPS
    assert losses(events) == expected
