"""R3, R5 and R8: a job's log is 1..n, each run event once and as the attempt's journal has it, and only the attempt
that was current ever published anything."""

from __future__ import annotations

import hashlib
from collections import defaultdict

from tests.faults.checker.evidence import Event, Evidence
from tests.faults.checker.tally import Tally
from tunesmith.common.v1 import event_pb2

_DISPATCHING = event_pb2.JOB_STATE_DISPATCHING


def check_numbers(evidence: Evidence, tally: Tally) -> None:
    """R8: sequences and run sequences without a gap, once each. A scenario that compacts logs says `"compacted"`."""
    for job_id, row in evidence.database.jobs.items():
        log = evidence.logs.get(job_id, ())
        sequences = [event.sequence for event in log]
        first = sequences[0] if sequences and evidence.scenario.get("compacted") else 1
        tally.expect(
            "R8",
            sequences == list(range(first, row["last_sequence"] + 1)),
            f"job {job_id}: the log is not {first}..{row['last_sequence']}: {_gap(sequences, first)}",
        )
        by_attempt: dict[int, list[int]] = defaultdict(list)
        for event in log:
            if event.run_sequence:
                by_attempt[event.attempt].append(event.run_sequence)
        for attempt, numbers in by_attempt.items():
            start = numbers[0] if evidence.scenario.get("compacted") else 1
            tally.expect(
                "R8",
                numbers == list(range(start, start + len(numbers))),
                f"job {job_id}, attempt {attempt}: run sequences are not contiguous: {_gap(numbers, start)}",
            )
        current = by_attempt.get(row["attempt"], [])
        if current or not evidence.scenario.get("compacted"):
            reached = current[-1] if current else 0
            tally.expect(
                "R8",
                row["run_cursor"] == reached,
                f"job {job_id}: the cursor is {row['run_cursor']}, the log has run sequence {reached}",
            )


def _gap(numbers: list[int], first: int) -> str:
    expected = first
    for number in numbers:
        if number != expected:
            return f"{expected} is followed by {number}" if number < expected else f"{expected} is missing"
        expected += 1
    return f"it ends at {expected - 1}"


def check_against_journals(evidence: Evidence, tally: Tally) -> None:
    """R5 and R8: what the log has of an attempt is what its journal has, from the start on, byte by byte."""
    for (job_id, attempt), runs in evidence.runs.items():
        stored = [event for event in evidence.logs.get(job_id, ()) if event.attempt == attempt and event.run_sequence]
        if not stored:
            continue
        # An attempt is on one node; more than one is for `check_attempts`.
        differences = [_difference(stored, run.journal.events) for run in runs]
        tally.expect(
            "R5", any(found is None for found in differences), f"job {job_id}, attempt {attempt}: {differences[0]}"
        )
        for event in stored:
            digest = hashlib.sha256(event.raw).digest()
            same = any(
                event.run_sequence <= len(run.journal.events)
                and hashlib.sha256(run.journal.events[event.run_sequence - 1].payload).digest() == digest
                for run in runs
            )
            tally.expect(
                "R8",
                same or not event.raw,
                f"job {job_id}: event {event.sequence} is not the journal's {attempt}/{event.run_sequence}",
            )


def _difference(stored: list[Event], journal: tuple[event_pb2.EncodedEvent, ...]) -> str | None:
    if stored[-1].run_sequence > len(journal):
        return f"the log has run sequence {stored[-1].run_sequence}, the journal ends at {len(journal)}"
    for event in stored:
        written = journal[event.run_sequence - 1]
        if (written.run_sequence, written.attempt, written.kind) != (event.run_sequence, event.attempt, event.kind):
            return f"run sequence {event.run_sequence} is another event in the journal"
    return None


def check_attempts(evidence: Evidence, tally: Tally) -> None:
    """R3: attempts follow each other, each dispatched once, and no older one is heard of after a newer one's first."""
    for job_id, row in evidence.database.jobs.items():
        log = evidence.logs.get(job_id, ())
        highest = 0
        for event in log:
            tally.expect(
                "R3",
                event.attempt >= highest,
                f"job {job_id}: event {event.sequence} of attempt {event.attempt} comes after attempt {highest} began",
            )
            highest = max(highest, event.attempt)
        dispatched = [event.attempt for event in log if event.payload.job_state.state == _DISPATCHING]
        # Numbers may be left out: one that a node had seen before control was put back to an older backup.
        tally.expect(
            "R3",
            dispatched == sorted(set(dispatched)) and (dispatched or [0])[-1] == row["attempt"],
            f"job {job_id}: attempts {dispatched} were dispatched, the job counts {row['attempt']}",
        )
        _check_run_events(job_id, log, tally)
    _check_records(evidence, tally)
    _check_nodes(evidence, tally)


def _check_run_events(job_id: str, log: tuple[Event, ...], tally: Tally) -> None:
    """A run's events lie between its own dispatch and where the job left the node."""
    on_node, current = False, 0
    for event in log:
        state = event.payload.job_state.state if event.payload.HasField("job_state") else None
        if state == _DISPATCHING:
            on_node, current = True, event.attempt
        elif state is not None and state not in _ON_NODE:
            on_node = False
        if event.run_sequence:
            tally.expect(
                "R3",
                on_node and event.attempt == current,
                f"job {job_id}: event {event.sequence} of attempt {event.attempt} was published"
                + (f" while attempt {current} was current" if on_node else " while no attempt was on a node"),
            )


_ON_NODE = frozenset(
    {
        event_pb2.JOB_STATE_DISPATCHING,
        event_pb2.JOB_STATE_RUNNING,
        event_pb2.JOB_STATE_PAUSING,
        event_pb2.JOB_STATE_CANCELLING,
    }
)


def _check_records(evidence: Evidence, tally: Tally) -> None:
    """Records of checkpoints and artifacts come from an event of the attempt that they name."""
    for row in evidence.database.checkpoints:
        told = any(
            event.attempt == row["attempt"]
            and event.run_sequence
            and event.payload.checkpoint.name == row["name"]
            and event.payload.checkpoint.manifest_sha256 == row["manifest_sha256"]
            for event in evidence.logs.get(row["job_id"], ())
        )
        tally.expect(
            "R3",
            told or bool(evidence.scenario.get("compacted")),
            f"job {row['job_id']}: no event of attempt {row['attempt']} tells of checkpoint {row['name']}",
        )
    for row in evidence.database.artifacts:
        job = evidence.database.jobs[row["job_id"]]
        told = any(
            event.attempt == job["attempt"]
            and event.run_sequence
            and event.payload.artifact.name == row["name"]
            and {(file.path, file.sha256) for file in event.payload.artifact.files}
            == {(file["path"], file["sha256"]) for file in row["files"]}
            for event in evidence.logs.get(row["job_id"], ())
        )
        tally.expect(
            "R3",
            told or bool(evidence.scenario.get("compacted")),
            f"job {row['job_id']}: artifact {row['name']} is not what attempt {job['attempt']} wrote",
        )


def _check_nodes(evidence: Evidence, tally: Tally) -> None:
    """A node's highest epochs are never above what control dispatched, nor below a run that it accepted."""
    for node, facts in evidence.nodes.items():
        if facts["installation_id"] != evidence.database.installation_id:
            continue
        for job_id, attempt in facts["highest_attempts"].items():
            job = evidence.database.jobs.get(job_id)
            tally.expect(
                "R3",
                job is None or attempt <= job["attempt"],
                f"node {node} accepted attempt {attempt} of job {job_id}, which control never dispatched",
            )
    for (job_id, attempt), runs in evidence.runs.items():
        tally.expect(
            "R3",
            len({run.node for run in runs}) == 1,
            f"job {job_id}: attempt {attempt} is on {len(runs)} nodes",
        )
        for run in runs:
            highest = evidence.nodes.get(run.node, {}).get("highest_attempts", {}).get(job_id, 0)
            tally.expect(
                "R3",
                attempt <= highest,
                f"node {run.node} has a run of attempt {attempt} of job {job_id}; its highest epoch is {highest}",
            )
            tally.expect(
                "R3",
                all(event.attempt == attempt for event in run.journal.events),
                f"the journal of job {job_id}, attempt {attempt}, has events of another attempt",
            )
