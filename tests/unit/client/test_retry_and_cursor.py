"""The pure rules of repeating a call and of going on with a watch."""

import random
from itertools import islice, pairwise

import grpc
import pytest

from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2, project_service_pb2
from tunesmith_client import (
    CallCancelled,
    ClientConfig,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    RetryPolicy,
    ServiceDefect,
    Unavailable,
)
from tunesmith_client._cursor import Cursor
from tunesmith_client._nouns import Datasets, Models, Nodes, Projects
from tunesmith_client._nouns_aio import AsyncDatasets, AsyncModels, AsyncNodes, AsyncProjects
from tunesmith_client._nouns_training import Artifacts, Jobs
from tunesmith_client._nouns_training_aio import AsyncArtifacts, AsyncJobs
from tunesmith_client._retry import Repeats, give_request_id, lost_if_cancelled, method_of, pause_after, pauses


def response(*sequences: int) -> job_service_pb2.WatchJobResponse:
    return job_service_pb2.WatchJobResponse(events=[event_pb2.Event(sequence=sequence) for sequence in sequences])


def cursor(*, after: int = 0, now: list[float] | None = None, give_up: float = 600.0) -> Cursor:
    clock = now if now is not None else [0.0]
    config = ClientConfig(watch_give_up_seconds=give_up)
    return Cursor(job_id="j", after_sequence=after, config=config, monotonic=lambda: clock[0])


def test_pauses_grow_to_the_limit_and_jitter_only_shortens_them() -> None:
    policy = RetryPolicy(initial_backoff_seconds=1, max_backoff_seconds=4, jitter=0.5)
    full = [1, 2, 4, 4]
    for seed in range(50):
        drawn = list(islice(pauses(policy, random.Random(seed)), 4))
        assert all(limit / 2 <= pause <= limit for pause, limit in zip(drawn, full, strict=True))


def test_only_unavailable_is_worth_repeating_and_the_service_says_how_soon() -> None:
    assert pause_after(NotFound("x"), 1.0) is None
    assert pause_after(ServiceDefect("x"), 1.0) is None
    assert pause_after(Unavailable("x"), 1.0) == 1.0
    assert pause_after(Unavailable("x", retry_after_seconds=3.0), 1.0) == 3.0


def _attempts_until(deadline_seconds: float, policy: RetryPolicy, *, seed: int) -> list[float]:
    """When a call is made that always meets a refused connection, in seconds."""
    repeats, now, made = Repeats(policy, random.Random(seed)), 0.0, [0.0]
    while True:
        pause = repeats.pause(Unavailable("connection refused"), remaining_seconds=deadline_seconds - now)
        if pause is None:
            return made
        now += pause
        made.append(now)


@pytest.mark.parametrize("seed", range(20))
def test_a_call_is_made_again_up_to_its_deadline_however_often_that_is(seed: int) -> None:
    made = _attempts_until(45.0, RetryPolicy(), seed=seed)
    assert len(made) > 20
    # A service that is back shortly before the deadline is found.
    assert 44.0 < made[-1] < 45.0
    gaps = [later - earlier for earlier, later in pairwise(made)]
    assert max(gaps) <= 2.0


def test_a_policy_may_end_the_attempts_before_the_deadline_does() -> None:
    assert len(_attempts_until(45.0, RetryPolicy(max_attempts=4), seed=1)) == 4
    assert len(_attempts_until(45.0, RetryPolicy(max_attempts=1), seed=1)) == 1


def test_what_the_service_asks_for_is_waited_or_the_call_ends() -> None:
    asked = Unavailable("busy", retry_after_seconds=5.0)
    assert Repeats(RetryPolicy(), random.Random(1)).pause(asked, remaining_seconds=6.0) == 5.0
    assert Repeats(RetryPolicy(), random.Random(1)).pause(asked, remaining_seconds=4.0) is None


def test_a_cancellation_that_nobody_here_asked_for_is_a_lost_service() -> None:
    assert isinstance(lost_if_cancelled(CallCancelled("CANCELLED")), Unavailable)
    refusal = NotFound("no such job")
    assert lost_if_cancelled(refusal) is refusal


def test_mutating_requests_get_an_id_once_and_keep_the_callers() -> None:
    request = project_service_pb2.DeleteProjectRequest(project_id=1)
    give_request_id(request)
    first = request.request_id
    give_request_id(request)
    assert first
    assert request.request_id == first
    own = job_service_pb2.StartTrainingRequest(request_id="mine")
    give_request_id(own)
    assert own.request_id == "mine"
    reading = job_service_pb2.GetJobRequest(job_id="j")
    give_request_id(reading)
    assert reading == job_service_pb2.GetJobRequest(job_id="j")
    assert method_of(own) == "StartTraining"


def test_deadlines_by_method() -> None:
    config = ClientConfig()
    assert config.deadline_of("GetJob") == 45.0
    assert config.deadline_of("PlanTraining") > config.deadline_of("StartTraining") > config.deadline_of("GetJob")
    assert ClientConfig(deadline_seconds=1.0).deadline_of("PlanTraining") == 1.0


def test_every_deadline_names_a_method_that_exists() -> None:
    from tests.fakes.scripted_control import SERVICES
    from tunesmith_client._config import DEADLINE_SECONDS

    methods = {method.name for service in SERVICES for method in service.methods}
    assert set(DEADLINE_SECONDS) <= methods


def test_events_are_given_once_and_in_order() -> None:
    watch = cursor(after=2)
    assert [event.sequence for event in watch.take(response(1, 2, 3, 4))] == [3, 4]
    assert [event.sequence for event in watch.take(response(3, 4, 5))] == [5]
    assert watch.request() == job_service_pb2.WatchJobRequest(job_id="j", after_sequence=5)


def test_the_position_is_what_was_given_out_not_what_arrived() -> None:
    watch = cursor()
    events = watch.take(response(1, 2, 3))
    next(events)
    assert watch.position == 1


def test_a_gap_is_an_error_not_a_skip() -> None:
    watch = cursor()
    with pytest.raises(ServiceDefect) as raised:
        list(watch.take(response(1, 3)))
    assert raised.value.reason == "SEQUENCE_GAP"
    assert watch.position == 1


def test_a_lost_stream_is_opened_again_and_a_refusal_is_not() -> None:
    watch = cursor()
    assert watch.pause_before_reopening(Unavailable("x")) > 0
    assert watch.pause_before_reopening(CallCancelled("x", code=grpc.StatusCode.CANCELLED)) > 0
    with pytest.raises(OutOfRange):
        watch.pause_before_reopening(OutOfRange("gone", reason="HISTORY_COMPACTED"))


def test_a_place_that_its_own_lost_stream_may_hold_is_waited_for() -> None:
    full = ResourceExhausted("full", reason="TOO_MANY_REQUESTS", retry_after_seconds=5.0)
    watch = cursor()
    with pytest.raises(ResourceExhausted):
        watch.pause_before_reopening(full)
    list(watch.take(response(1)))
    assert watch.pause_before_reopening(full) == 5.0


def test_a_watch_gives_up_only_after_hearing_nothing_for_its_limit() -> None:
    now = [0.0]
    watch = cursor(now=now, give_up=10.0)
    watch.pause_before_reopening(Unavailable("x"))
    now[0] = 9.0
    watch.pause_before_reopening(Unavailable("x"))
    list(watch.take(response()))
    now[0] = 100.0
    watch.pause_before_reopening(Unavailable("x"))
    now[0] = 111.0
    with pytest.raises(Unavailable):
        watch.pause_before_reopening(Unavailable("x"))


@pytest.mark.parametrize(
    ("blocking", "asynchronous"),
    [
        (Projects, AsyncProjects),
        (Datasets, AsyncDatasets),
        (Models, AsyncModels),
        (Jobs, AsyncJobs),
        (Artifacts, AsyncArtifacts),
        (Nodes, AsyncNodes),
    ],
)
def test_both_clients_speak_the_same_verbs(blocking: type, asynchronous: type) -> None:
    def verbs(noun: type) -> dict[str, tuple[str, ...]]:
        return {
            name: method.__code__.co_varnames[: method.__code__.co_argcount + method.__code__.co_kwonlyargcount]
            for name, method in vars(noun).items()
            if not name.startswith("_")
        }

    assert verbs(blocking) == verbs(asynchronous)
