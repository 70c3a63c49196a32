"""Reasons, kinds and states of the code are the contract's, and wire forms that are shared by design stay shared."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import control_service
from control_service.adapters.event_codec import ProtoEventCodec
from control_service.domain import job_state
from control_service.domain.event import EventKind, StoredEvent
from control_service.domain.job_state import JobState
from tunesmith.common.v1 import errors_pb2, event_pb2
from tunesmith.control.v1 import job_service_pb2


def _names(enum: Any) -> set[str]:
    prefix = enum.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(prefix) for value in enum.DESCRIPTOR.values} - {"UNSPECIFIED"}


def test_event_kinds_are_the_numbers_of_the_payloads_fields() -> None:
    fields = {field.number: field.name for field in event_pb2.EventPayload.DESCRIPTOR.oneofs_by_name["kind"].fields}
    assert {int(kind): kind.name.lower() for kind in EventKind} == fields
    assert {value.number for value in event_pb2.EventKind.DESCRIPTOR.values} == {0, *fields}


def test_the_state_table_has_every_state_each_reachable_and_terminals_closed() -> None:
    reachable = {JobState.QUEUED}
    while True:
        following = reachable.union(*(job_state.TRANSITIONS[state] for state in reachable))
        if following == reachable:
            break
        reachable = following
    assert set(job_state.TRANSITIONS) == set(JobState) == reachable
    assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} == job_state.TERMINAL
    assert all(not job_state.TRANSITIONS[state] for state in job_state.TERMINAL)


# A reason stands as the first argument of an error's construction, or as the `reason` of one.
_RAISED = re.compile(
    r"(?:InvalidArgument|NotFound|AlreadyExists|FailedPrecondition|Aborted|OutOfRange|ResourceExhausted|Unavailable"
    r"|Internal|DeadlineTooShort)\(\s*\"(?P<first>[A-Z][A-Z0-9_]+)\""
    r"|\breason=\"(?P<keyword>[A-Z][A-Z0-9_]+)\""
    r"|\b\w+, \"(?P<table>[A-Z][A-Z0-9]*_[A-Z0-9_]+)\", \""
)


def _raised_reasons() -> dict[str, str]:
    found: dict[str, str] = {}
    for path in Path(control_service.__file__).parent.rglob("*.py"):
        for match in _RAISED.finditer(path.read_text()):
            found[match["first"] or match["keyword"] or match["table"]] = path.name
    return found


def test_every_reason_that_control_raises_is_in_the_contract() -> None:
    raised = _raised_reasons()
    assert {"INVALID_FIELD", "JOB_NOT_FOUND", "DISK_FULL", "SHUTTING_DOWN"} <= set(raised), "the search finds reasons"
    assert {reason: file for reason, file in raised.items() if reason not in _names(errors_pb2.ErrorReason)} == {}


def test_an_encoded_event_and_an_event_are_the_same_bytes() -> None:
    payload = event_pb2.EventPayload(step=event_pb2.StepEvent(step=3, total_steps=9, loss=1.5))
    event = event_pb2.Event(sequence=7, attempt=2, run_sequence=5, kind=event_pb2.EVENT_KIND_STEP, payload=payload)
    event.time.FromDatetime(datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC))
    encoded = event_pb2.EncodedEvent.FromString(event.SerializeToString())
    assert encoded.payload == payload.SerializeToString()
    assert event_pb2.Event.FromString(encoded.SerializeToString()) == event
    for field in event_pb2.Event.DESCRIPTOR.fields:
        assert event_pb2.EncodedEvent.DESCRIPTOR.fields_by_number[field.number].name == field.name


def test_an_encoded_page_is_a_watch_response() -> None:
    payload = event_pb2.EventPayload(log=event_pb2.LogEvent(level="info", message="hello"))
    events = [
        StoredEvent(
            sequence=sequence,
            attempt=1,
            run_sequence=sequence + 1,
            kind=13,
            time=datetime(2026, 1, 2, tzinfo=UTC),
            payload=payload.SerializeToString(),
        )
        for sequence in (1, 2)
    ]
    response = job_service_pb2.WatchJobResponse.FromString(ProtoEventCodec().encode_page(events))
    assert [event.sequence for event in response.events] == [1, 2]
    assert [event.payload for event in response.events] == [payload, payload]
    assert not response.HasField("heartbeat")
    beat = job_service_pb2.WatchJobResponse.FromString(ProtoEventCodec().encode_heartbeat(9))
    assert (list(beat.events), beat.heartbeat.position) == ([], 9)


def test_a_kind_of_a_later_version_passes_through_a_page() -> None:
    later = StoredEvent(
        sequence=1, attempt=1, run_sequence=1, kind=999, time=datetime(2026, 1, 2, tzinfo=UTC), payload=b"\xfa\x3e\x00"
    )
    response = job_service_pb2.WatchJobResponse.FromString(ProtoEventCodec().encode_page([later]))
    assert int(response.events[0].kind) == 999
    assert response.events[0].payload.SerializeToString() == b"\xfa\x3e\x00"
