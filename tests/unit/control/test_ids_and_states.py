"""ULIDs, and the state table by itself."""

from __future__ import annotations

import pytest

from control_service.domain.errors import FailedPrecondition
from control_service.domain.ids import ULID_LENGTH, UlidSource
from control_service.domain.job_state import ON_NODE, TERMINAL, TRANSITIONS, JobState, check_transition


def test_ids_rise_even_when_the_clock_stands_or_goes_back() -> None:
    times = iter([1000, 1000, 1000, 900, 1001, 2**48 - 1])
    source = UlidSource(lambda: next(times))
    made = [source.new_id() for _ in range(6)]
    assert made == sorted(made)
    assert len(set(made)) == 6
    assert {len(value) for value in made} == {ULID_LENGTH}
    assert made[-1].startswith("7ZZZZZZZZZ")


def test_ids_rise_above_an_earlier_process_whose_clock_was_ahead() -> None:
    earlier = UlidSource(lambda: 5_000_000).new_id()
    later = UlidSource(lambda: 1_400_000, newest=earlier)
    first, second = later.new_id(), later.new_id()
    assert earlier < first < second


def test_every_state_is_in_the_table_and_reachable_and_terminal_means_terminal() -> None:
    assert set(TRANSITIONS) == set(JobState)
    reached = {JobState.QUEUED}
    while following := {state for known in reached for state in TRANSITIONS[known]} - reached:
        reached |= following
    assert reached == set(JobState)
    assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} == TERMINAL
    assert not ON_NODE & TERMINAL


def test_from_every_state_that_is_not_terminal_a_job_can_be_cancelled() -> None:
    for state in set(JobState) - TERMINAL:
        reached, frontier = {state}, {state}
        while frontier := {new for known in frontier for new in TRANSITIONS[known]} - reached:
            reached |= frontier
        assert JobState.CANCELLED in reached


def test_a_transition_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        check_transition(JobState.SUCCEEDED, JobState.QUEUED)
    assert refused.value.reason == "JOB_STATE"
    assert refused.value.details == {"state": "SUCCEEDED", "wanted_state": "QUEUED"}
