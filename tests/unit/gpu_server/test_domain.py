"""Fencing, run states and the memory ledger: pure rules, checked as tables."""

from __future__ import annotations

import pytest

from gpu_service.domain.errors import Refusal
from gpu_service.domain.fencing import Admission, admit
from gpu_service.domain.memory import MemoryLedger
from gpu_service.domain.run_state import TERMINAL_STATES, TRANSITIONS, RunState, shown_state
from gpu_service.journal import TERMINAL_RUN_STATES
from tunesmith.common.v1 import event_pb2


@pytest.mark.parametrize(
    ("attempt", "highest", "known", "expected"),
    [
        (1, 0, None, Admission.NEW_RUN),
        (7, 0, None, Admission.NEW_RUN),
        (3, 2, None, Admission.NEW_RUN),
        (2, 2, "digest", Admission.SAME_RUN),
        (2, 2, "other", "RUN_CONFLICT"),
        # Released: nobody may start it again.
        (2, 2, None, "STALE_EPOCH"),
        (1, 2, None, "STALE_EPOCH"),
        # Still here, but a newer attempt is known.
        (1, 2, "digest", "STALE_EPOCH"),
    ],
)
def test_fencing(attempt: int, highest: int, known: str | None, expected: Admission | str) -> None:
    if isinstance(expected, Admission):
        found = admit(attempt=attempt, spec_digest="digest", highest_attempt=highest, known_digest=known)
        assert found is expected
        return
    with pytest.raises(Refusal) as refused:
        admit(attempt=attempt, spec_digest="digest", highest_attempt=highest, known_digest=known)
    assert refused.value.reason == expected


def test_run_states_are_those_of_the_contract() -> None:
    wire = {name.removeprefix("RUN_STATE_"): number for name, number in event_pb2.RunState.items() if number}
    assert {state.name: state.value for state in RunState} == wire
    assert {state.value for state in TERMINAL_STATES} == set(TERMINAL_RUN_STATES)


def test_every_state_is_reached_and_terminals_are_closed() -> None:
    assert set(TRANSITIONS) == set(RunState)
    reached = {RunState.ACCEPTED}
    while more := {following for state in reached for following in TRANSITIONS[state]} - reached:
        reached |= more
    assert reached == set(RunState)
    assert all(not TRANSITIONS[state] for state in TERMINAL_STATES)
    assert all(TRANSITIONS[state] & TERMINAL_STATES for state in set(RunState) - TERMINAL_STATES)


def test_a_stop_is_shown_until_the_end() -> None:
    assert shown_state(RunState.RUNNING, stop_requested=True) is RunState.STOPPING
    assert shown_state(RunState.RUNNING, stop_requested=False) is RunState.RUNNING
    assert shown_state(RunState.SUCCEEDED, stop_requested=True) is RunState.SUCCEEDED


def test_one_run_has_a_device_and_what_fits() -> None:
    ledger = MemoryLedger()
    ledger.reserve(run_id="a/1", device_id="cuda:0", num_bytes=60, capacity_bytes=80)
    ledger.reserve(run_id="a/1", device_id="cuda:0", num_bytes=60, capacity_bytes=80)
    with pytest.raises(Refusal, match="NODE_BUSY"):
        ledger.reserve(run_id="b/1", device_id="cuda:0", num_bytes=1, capacity_bytes=80)
    with pytest.raises(Refusal, match="NODE_BUSY"):
        ledger.reserve(run_id="b/1", device_id="cuda:1", num_bytes=81, capacity_bytes=80)
    ledger.reserve(run_id="b/1", device_id="cuda:1", num_bytes=80, capacity_bytes=80)
    assert ledger.holder_of("cuda:0") == "a/1"
    ledger.release("a/1")
    ledger.release("a/1")
    assert ledger.holder_of("cuda:0") is None
