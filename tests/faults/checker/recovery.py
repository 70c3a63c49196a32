"""R4 and R6: no acknowledged job vanishes or goes round for ever, each attempt goes on from the newest checkpoint that
can be had, and an engine whose server alone died is the same engine afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tests.faults.checker.evidence import OK, Event, Evidence
from tests.faults.checker.states import job_state
from tests.faults.checker.tally import Tally
from tunesmith.common.v1 import event_pb2

_STOPS = ("PauseJob", "CancelJob", "ResumeJob")
_ENDS_SERVER_ALONE = frozenset({"gpu", "control", "client"})
# Kinds of faults that end a process; the rest hold it up or cut its links.
_ENDS = frozenset({"kill", "failpoint", "terminate"})


@dataclass(kw_only=True, slots=True)
class _Checkpoint:
    """What the log tells of one checkpoint so far."""

    step: int
    # Where its bytes lie besides control's store; empty: nowhere.
    node: str
    is_replicated: bool = False


def check_jobs_end_well(evidence: Evidence, tally: Tally) -> None:
    """R4: retries stay within their limit, and what the job counts is what its log tells."""
    for job_id, row in evidence.database.jobs.items():
        tally.expect(
            "R4",
            row["num_retries"] <= row["max_retries"],
            f"job {job_id} was retried {row['num_retries']} times; {row['max_retries']} are allowed",
        )
        retries = [
            event
            for event in evidence.logs.get(job_id, ())
            if job_state(event) == "QUEUED" and event.payload.job_state.HasField("failure")
        ]
        tally.expect(
            "R4",
            len(retries) == row["num_retries"] or bool(evidence.scenario.get("compacted")),
            f"job {job_id} counts {row['num_retries']} retries; its log tells {len(retries)}",
        )
        if evidence.scenario.get("all_over"):
            tally.expect(
                "R4",
                row["state"] in {"SUCCEEDED", "FAILED", "CANCELLED"},
                f"job {job_id} is still {row['state']}",
            )


def check_resumes(evidence: Evidence, tally: Tally) -> None:
    """R4: an attempt's first step follows the newest checkpoint that its node or control had, and none is left out."""
    if evidence.scenario.get("compacted"):
        return
    for job_id, log in evidence.logs.items():
        known: dict[str, _Checkpoint] = {}
        node, attempt, usable, last_step = "", 0, {}, 0
        for event in log:
            state = event.payload.job_state
            if event.payload.HasField("job_state") and state.state == event_pb2.JOB_STATE_DISPATCHING:
                node, attempt, last_step = state.node, event.attempt, 0
                usable = _usable(known, node)
            elif event.payload.HasField("checkpoint"):
                _fold(known, event, node)
                if not last_step:
                    # One that turned out not to be there is forgotten before the run begins.
                    usable = _usable(known, node)
            elif event.payload.HasField("resumed"):
                resumed = event.payload.resumed
                newest = max(usable, key=lambda name: usable[name], default="")
                tally.expect(
                    "R4",
                    (resumed.checkpoint, resumed.from_step) == (newest, usable.get(newest, 0)),
                    f"job {job_id}: attempt {attempt} went on from {resumed.checkpoint}, step {resumed.from_step};"
                    f" the newest to be had was {newest or 'none'}",
                )
                last_step = resumed.from_step
            elif event.payload.HasField("step"):
                if not last_step and event.payload.step.step == 1:
                    tally.expect(
                        "R4", not usable, f"job {job_id}: attempt {attempt} began anew in spite of {sorted(usable)}"
                    )
                tally.expect(
                    "R4",
                    event.payload.step.step == last_step + 1,
                    f"job {job_id}: attempt {attempt} did step {event.payload.step.step} after step {last_step}",
                )
                last_step = event.payload.step.step


def _usable(known: Mapping[str, _Checkpoint], node: str) -> dict[str, int]:
    return {name: one.step for name, one in known.items() if one.is_replicated or (node and one.node == node)}


def _fold(known: dict[str, _Checkpoint], event: Event, node: str) -> None:
    told = event.payload.checkpoint
    if told.status == event_pb2.CHECKPOINT_STATUS_COMMITTED:
        known[told.name] = _Checkpoint(step=told.step, node=node)
    elif told.status == event_pb2.CHECKPOINT_STATUS_REPLICATED:
        # Control keeps one copy.
        for one in known.values():
            one.is_replicated = False
        known.setdefault(told.name, _Checkpoint(step=told.step, node="")).is_replicated = True
    elif told.name in known:
        if event.run_sequence and known[told.name].is_replicated:
            known[told.name].node = ""
        else:
            del known[told.name]


def check_adoptions(evidence: Evidence, tally: Tally) -> None:
    """R6: between two looks at a run with nothing killed but its server, its processes and attempt are the same.

    A node that was stopped for longer than its lease is no such case: control has rightly given its job away.
    """
    looks: dict[str, list[Mapping[str, Any]]] = {}
    for observation in sorted(evidence.processes, key=lambda one: one["at"]):
        if observation.get("job_id"):
            looks.setdefault(observation["job_id"], []).append(observation)
    for job_id, observations in looks.items():
        for before, after in pairwise(observations):
            ended = [
                fault
                for fault in evidence.faults
                if before["at"] <= fault["at"] <= after["at"] and fault["kind"] in _ENDS
            ]
            asked = any(
                operation.started <= after["at"]
                and operation.ended >= before["at"]
                and operation.outcome != "NOT_FOUND"
                for operation in evidence.operations_on(job_id, *_STOPS)
            )
            targets = {fault["target"] for fault in ended}
            if asked or not targets or not targets <= _ENDS_SERVER_ALONE or _was_given_away(evidence, before, after):
                continue
            for field in ("shim_pid", "engine_pid", "start_time", "attempt"):
                tally.expect(
                    "R6",
                    before[field] == after[field],
                    f"job {job_id}: {field} was {before[field]} before {sorted(targets)} was killed and is"
                    f" {after[field]} afterwards",
                )


def _was_given_away(evidence: Evidence, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a later attempt is there because the node was stopped for so long that its lease ran out.

    Evidence that does not tell the lease excuses nothing, nor does a lease that ran out for any other reason.
    """
    lease_seconds = evidence.scenario.get("node_lease_seconds")
    if lease_seconds is None or after["attempt"] <= before["attempt"]:
        return False
    was_lost = any(
        event.attempt == before["attempt"]
        and event.payload.HasField("node_reachability")
        and not event.payload.node_reachability.reachable
        for event in evidence.logs.get(before["job_id"], ())
    )
    # The run is ended only once its node has heard of it, which may be up to the next look.
    return was_lost and any(
        end - begin >= lease_seconds and begin <= after["at"] and end >= before["at"] - lease_seconds
        for begin, end in _stops(evidence, before["node"])
    )


def _stops(evidence: Evidence, node: str) -> Iterator[tuple[float, float]]:
    """From when until when processes of the node's server were stopped."""
    stopped_at: dict[int, float] = {}
    for fault in evidence.faults:
        if fault["kind"] == "stop" and fault.get("service") == node:
            stopped_at.setdefault(fault["pid"], fault["at"])
        elif fault["kind"] == "continue" and fault["pid"] in stopped_at:
            yield stopped_at.pop(fault["pid"]), fault["at"]


def check_vanished(evidence: Evidence, tally: Tally) -> None:
    """R4: every job that any answer ever told of is there, unless somebody deleted it."""
    told = {
        job.job_id: operation
        for operation in evidence.operations
        if operation.outcome == OK and "job" in operation.response.DESCRIPTOR.fields_by_name
        for job in [operation.response.job]
    }
    for job_id, operation in told.items():
        tally.expect(
            "R4",
            job_id in evidence.database.jobs or bool(evidence.operations_on(job_id, "DeleteJob")),
            f"job {job_id}, told by {operation.name}, has vanished",
        )
