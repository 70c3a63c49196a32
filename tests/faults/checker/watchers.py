"""R9 and R31: what each consumer was given is the log from where it began; who came second never harmed the first."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

from tests.faults.checker.evidence import Event, Evidence
from tests.faults.checker.states import TERMINAL
from tests.faults.checker.tally import Tally


def check_watches(evidence: Evidence, tally: Tally) -> None:
    """R9: per consumer and job, contiguous from its first event, equal to the log, and to its end if the job is over.

    A scenario whose consumers leave on purpose says `"watches_end_early"`.
    """
    for consumer, lines in evidence.watches.items():
        given: dict[str, list[Any]] = {}
        for line in lines:
            given.setdefault(line["job_id"], []).append(line)
        for job_id, seen in given.items():
            row = evidence.database.jobs.get(job_id)
            if row is None:
                continue
            log = {event.sequence: event for event in evidence.logs.get(job_id, ())}
            first = seen[0]["sequence"]
            numbers = [line["sequence"] for line in seen]
            tally.expect(
                "R9",
                numbers == list(range(first, first + len(numbers))),
                f"consumer {consumer}: events of job {job_id} came as {_oddity(numbers)}",
            )
            wrong = [line["sequence"] for line in seen if not _is_same(line, log.get(line["sequence"]))]
            tally.expect(
                "R9", not wrong, f"consumer {consumer}: events {wrong[:5]} of job {job_id} are not those of the log"
            )
            if row["state"] in TERMINAL and not evidence.scenario.get("watches_end_early"):
                tally.expect(
                    "R9",
                    numbers[-1] == row["last_sequence"],
                    f"consumer {consumer} was given job {job_id} to event {numbers[-1]} of {row['last_sequence']}",
                )


def _oddity(numbers: list[int]) -> str:
    for before, after in pairwise(numbers):
        if after != before + 1:
            return f"..., {before}, {after}, ..."
    return "a row"


def _is_same(line: Any, event: Event | None) -> bool:
    if event is None:
        return False
    return (line["attempt"], line["run_sequence"], line["payload_sha256"]) == (
        event.attempt,
        event.run_sequence,
        hashlib.sha256(event.raw).hexdigest(),
    )


def check_twins(evidence: Evidence, tally: Tally) -> None:
    """R31: a fault of kind `twin` tells the second's `status` and whether the first was alive and answered after it."""
    for fault in evidence.faults:
        if fault["kind"] != "twin":
            continue
        name = f"a second {fault['target']}"
        tally.expect("R31", fault["status"] not in (0, None), f"{name} did not refuse to start: {fault['status']}")
        tally.expect("R31", bool(fault["first_alive"]), f"{name} harmed the first")
