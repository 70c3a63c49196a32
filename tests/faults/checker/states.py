"""R7 and R14: states follow their table, terminal is terminal, answers never go backwards, and what a run durably
recorded as its outcome is the job's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from tests.faults.checker.evidence import OK, Event, Evidence, Operation
from tests.faults.checker.tally import Tally
from tunesmith.common.v1 import errors_pb2, event_pb2

# The design's table of a job's states, written down again: QUEUED, DISPATCHING, RUNNING, PAUSING, PAUSED, CANCELLING.
_FOLLOWING: Mapping[str, frozenset[str]] = {
    "UNSPECIFIED": frozenset({"QUEUED"}),
    "QUEUED": frozenset({"DISPATCHING", "CANCELLED", "FAILED"}),
    "DISPATCHING": frozenset({"RUNNING", "QUEUED", "FAILED", "CANCELLING", "PAUSING"}),
    "RUNNING": frozenset({"SUCCEEDED", "FAILED", "QUEUED", "PAUSING", "CANCELLING"}),
    "PAUSING": frozenset({"PAUSED", "SUCCEEDED", "FAILED", "QUEUED", "CANCELLING"}),
    "PAUSED": frozenset({"QUEUED", "CANCELLED"}),
    "CANCELLING": frozenset({"CANCELLED", "FAILED"}),
    "SUCCEEDED": frozenset(),
    "FAILED": frozenset(),
    "CANCELLED": frozenset(),
}
TERMINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})
_RUN_OVER = frozenset({"SUCCEEDED", "FAILED", "CANCELLED", "INTERRUPTED"})
# A run that succeeded and whose job did not: its artifacts could not be had, or nobody wanted them any more.
_NOT_COLLECTED = frozenset({"COLLECTING", "DISK_FULL"})
# The shim's own file tells which run is in hand; it is written after the journal, still later by one that was stopped.
_SETTLE_SECONDS = 5.0
_CLOSING_RANK = {"realized": 0, "export": 1, "artifact": 2, "memory_released": 3}
_NO_LONGER = frozenset({"step", "checkpoint", "plan", "resumed"})


def job_state(event: Event) -> str | None:
    """The state that a JOB_STATE event tells; None for every other event."""
    return _job_name(event.payload.job_state.state) if event.payload.HasField("job_state") else None


def _job_name(value: Any) -> str:
    return event_pb2.JobState.Name(value).removeprefix("JOB_STATE_")


def run_state(payload: event_pb2.EventPayload) -> str | None:
    """The state that a RUN_STATE event tells; None for every other event."""
    if not payload.HasField("run_state"):
        return None
    return event_pb2.RunState.Name(payload.run_state.state).removeprefix("RUN_STATE_")


def check_transitions(evidence: Evidence, tally: Tally) -> None:
    """R7: every JOB_STATE event goes on from the one before, by the table; the terminal one closes the log."""
    for job_id, row in evidence.database.jobs.items():
        log = evidence.logs.get(job_id, ())
        state = "UNSPECIFIED"
        for index, event in enumerate(log):
            following = job_state(event)
            if following is None:
                continue
            told = _job_name(event.payload.job_state.previous_state)
            if index == 0 or not evidence.scenario.get("compacted") or state != "UNSPECIFIED":
                tally.expect(
                    "R7", told == state, f"job {job_id}: event {event.sequence} goes on from {told}, not {state}"
                )
            tally.expect(
                "R7",
                following in _FOLLOWING[told],
                f"job {job_id}: event {event.sequence} moves it from {told} to {following}",
            )
            state = following
            if state in TERMINAL:
                tally.expect(
                    "R7", event is log[-1], f"job {job_id}: the log goes on after {state} at event {event.sequence}"
                )
        if state != "UNSPECIFIED":
            tally.expect("R7", row["state"] == state, f"job {job_id} is {row['state']}; its log says {state}")


def check_answers(evidence: Evidence, tally: Tally) -> None:
    """R7: each answer is the job as it was at one point of its log, and later calls never see an earlier point."""
    seen: dict[str, list[tuple[Operation, Any]]] = defaultdict(list)
    for operation in evidence.operations:
        for job in _jobs_told(operation):
            seen[job.job_id].append((operation, job))
    for job_id, answers in seen.items():
        states = _states_by_sequence(evidence.logs.get(job_id, ()))
        for operation, job in answers:
            expected = states.get(job.last_sequence)
            if expected is None:
                row = evidence.database.jobs.get(job_id)
                tally.expect(
                    "R7",
                    row is None or bool(evidence.scenario.get("compacted")),
                    f"{operation.name}: job {job_id} was told at event {job.last_sequence}, which its log lacks",
                )
                continue
            tally.expect(
                "R7",
                (_job_name(job.state), job.attempt) == expected,
                f"{operation.name}: job {job_id} was told as {_job_name(job.state)}, attempt {job.attempt}, at event"
                f" {job.last_sequence}; there it was {expected[0]}, attempt {expected[1]}",
            )
        _check_order(job_id, answers, tally)


def _jobs_told(operation: Operation) -> Iterator[Any]:
    if operation.outcome != OK:
        return
    fields = operation.response.DESCRIPTOR.fields_by_name
    if "job" in fields:
        yield operation.response.job
    if "jobs" in fields:
        yield from operation.response.jobs


def _states_by_sequence(log: tuple[Event, ...]) -> dict[int, tuple[str, int]]:
    """State and attempt of the job once it had each event."""
    found: dict[int, tuple[str, int]] = {}
    state: str | None = None
    for event in log:
        state = job_state(event) or state
        if state is not None:
            found[event.sequence] = (state, event.attempt)
    return found


def _check_order(job_id: str, answers: list[tuple[Operation, Any]], tally: Tally) -> None:
    by_end = sorted(answers, key=lambda answer: answer[0].ended)
    by_start = sorted(answers, key=lambda answer: answer[0].started)
    newest, newest_name, index = 0, "", 0
    for operation, job in by_start:
        # Whatever ended before this call began was known to somebody.
        while index < len(by_end) and by_end[index][0].ended < operation.started:
            ended, told = by_end[index]
            if told.last_sequence > newest:
                newest, newest_name = told.last_sequence, ended.name
            index += 1
        tally.expect(
            "R7",
            job.last_sequence >= newest,
            f"{operation.name}: job {job_id} was told at event {job.last_sequence}; {newest_name} had told {newest}",
        )


def check_outcomes(evidence: Evidence, tally: Tally) -> None:
    """R7: journals end with one terminal record, and the job is what the newest attempt's says."""
    for (job_id, attempt), runs in evidence.runs.items():
        row = evidence.database.jobs.get(job_id)
        for run in runs:
            _check_closing(job_id, attempt, run.journal.events, tally)
            outcome = _outcome_of(run.journal.events)
            if row is None or outcome is None:
                continue
            log = evidence.logs.get(job_id, ())
            if attempt < row["attempt"]:
                lost = any(
                    event.attempt == attempt
                    and event.payload.HasField("node_reachability")
                    and not event.payload.node_reachability.reachable
                    for event in log
                )
                tally.expect(
                    "R7",
                    run_state(outcome) != "SUCCEEDED" or lost or not _was_heard(log, attempt),
                    f"job {job_id}: attempt {attempt} recorded SUCCEEDED, and attempt {row['attempt']} was dispatched",
                )
            elif attempt == row["attempt"] and row["state"] in TERMINAL:
                _check_outcome(job_id, row, log, outcome, tally)


def _was_heard(log: tuple[Event, ...], attempt: int) -> bool:
    return any(event.attempt == attempt and event.run_sequence for event in log)


def _outcome_of(events: tuple[event_pb2.EncodedEvent, ...]) -> event_pb2.EventPayload | None:
    for event in reversed(events):
        payload = event_pb2.EventPayload.FromString(event.payload)
        if run_state(payload) in _RUN_OVER:
            return payload
    return None


def _check_outcome(
    job_id: str, row: Mapping[str, Any], log: tuple[Event, ...], outcome: event_pb2.EventPayload, tally: Tally
) -> None:
    ended, state = run_state(outcome), row["state"]
    failure = row["failure"] or {}
    reason = failure.get("reason", "")
    cancelled = any(job_state(event) == "CANCELLING" for event in log)
    told = [
        event
        for event in log
        if event.attempt == row["attempt"] and event.run_sequence and run_state(event.payload) in _RUN_OVER
    ]
    if ended == "SUCCEEDED":
        holds = state == "SUCCEEDED" or (state == "CANCELLED" and cancelled) or reason in _NOT_COLLECTED
        tally.expect("R7", holds, f"job {job_id}: its run recorded SUCCEEDED, the job is {state} {reason}")
    elif ended == "FAILED":
        recorded = errors_pb2.ErrorReason.Name(outcome.run_state.failure.reason).removeprefix("ERROR_REASON_")
        last = failure.get("details", {}).get("last_reason", "")
        # One that was queued again may have been cancelled, or refused, while it waited.
        waited = log[-1].payload.job_state.previous_state == event_pb2.JOB_STATE_QUEUED if log else False
        holds = waited or (state == "FAILED" and recorded in {reason, last})
        tally.expect(
            "R7", holds or not told, f"job {job_id}: its run recorded FAILED {recorded}, the job is {state} {reason}"
        )
    else:
        tally.expect(
            "R7",
            state in {"CANCELLED", "FAILED"} or not told,
            f"job {job_id}: its run recorded {ended}, the job is {state}",
        )
    tally.expect("R7", len(told) <= 1, f"job {job_id}: the log has {len(told)} outcomes of attempt {row['attempt']}")


def _check_closing(job_id: str, attempt: int, events: tuple[event_pb2.EncodedEvent, ...], tally: Tally) -> None:
    """R7 and R14: the terminal record is the last, and what stands before it stands in its order."""
    name = f"the journal of job {job_id}, attempt {attempt}"
    rank, ended = -1, ""
    for event in events:
        payload = event_pb2.EventPayload.FromString(event.payload)
        kind = payload.WhichOneof("kind") or ""
        tally.expect("R7", not ended, f"{name} goes on with {kind} after {ended}")
        state = run_state(payload)
        if state in _RUN_OVER:
            ended = state
            if state in {"SUCCEEDED", "CANCELLED", "INTERRUPTED"}:
                # What a run held is given back before it says that it is over.
                promise = "R14" if state == "CANCELLED" else "R7"
                tally.expect(
                    promise, rank == _CLOSING_RANK["memory_released"], f"{name}: {state} without MEMORY_RELEASED"
                )
        if kind in _CLOSING_RANK:
            tally.expect("R7", _CLOSING_RANK[kind] >= rank, f"{name}: {kind} stands out of its order")
            rank = _CLOSING_RANK[kind]
        elif kind in _NO_LONGER:
            tally.expect("R7", rank < 0, f"{name}: {kind} after training was over")


def check_cancels(evidence: Evidence, tally: Tally) -> None:
    """R14: CANCELLED is said once the run's end and memory are told, and no process of the run is seen afterwards."""
    for job_id, row in evidence.database.jobs.items():
        if row["state"] != "CANCELLED":
            continue
        log = evidence.logs.get(job_id, ())
        ran = [event for event in log if event.attempt == row["attempt"] and event.run_sequence]
        if ran:
            tally.expect(
                "R14",
                run_state(ran[-1].payload) in _RUN_OVER or not _was_cancelling(log),
                f"job {job_id} is CANCELLED and its log does not tell that its run ended",
            )
        said = [
            operation.ended
            for operation in evidence.operations
            for job in _jobs_told(operation)
            if job.job_id == job_id and _job_name(job.state) == "CANCELLED"
        ]
        for observation in evidence.processes:
            if said and observation.get("job_id") == job_id:
                tally.expect(
                    "R14",
                    observation["at"] <= min(said) + _SETTLE_SECONDS,
                    f"job {job_id}: process {observation['engine_pid']} had its run after CANCELLED was told",
                )


def _was_cancelling(log: tuple[Event, ...]) -> bool:
    return any(job_state(event) == "CANCELLING" for event in log)
