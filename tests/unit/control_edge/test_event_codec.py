"""Facts to payloads and back, and what cannot be read."""

from __future__ import annotations

import pytest

from control_service.adapters.event_codec import ProtoEventCodec
from control_service.domain import event as facts
from control_service.domain.artifact import ArtifactKind, CheckpointStatus, FileReference
from control_service.domain.errors import Internal
from control_service.domain.event import ControlFact, EventKind, Fact
from control_service.domain.failure import Failure, Fault
from control_service.domain.job_state import JobState
from control_service.domain.run import Phase, RunState
from tunesmith.common.v1 import event_pb2, plan_pb2

FILES = (FileReference(path="a/b", sha256="0" * 64, size_bytes=3),)
FAILURE = Failure(
    reason="ENGINE_KILLED",
    fault=Fault.HARDWARE,
    message="m",
    stage="WEIGHTS",
    exception_type="E",
    file="f",
    versions={"torch": "1"},
    signal=9,
    details={"a": "b"},
)
CODEC = ProtoEventCodec()

WRITTEN: list[ControlFact] = [
    facts.JobStateFact(previous_state=None, state=JobState.QUEUED),
    facts.JobStateFact(
        previous_state=JobState.RUNNING, state=JobState.FAILED, message="m", failure=FAILURE, node="gpu-0"
    ),
    facts.NodeReachabilityFact(node="gpu-0", reachable=False),
    facts.NodeReachabilityFact(node="gpu-0", reachable=True),
    facts.WarningFact(code="a-code", message="m"),
    facts.PhaseFact(phase=Phase.COLLECTING),
    facts.CheckpointFact(
        name="step-00000020",
        step=20,
        status=CheckpointStatus.REPLICATED,
        size_bytes=3,
        manifest_sha256="1" * 64,
        files=FILES,
        seconds=0.5,
        probe_loss=2.5,
        held_out_loss=0.0,
        best=True,
    ),
    facts.ArtifactFact(name="adapter", kind=ArtifactKind.ADAPTER, files=FILES, collected=True),
]


@pytest.mark.parametrize("fact", WRITTEN, ids=lambda fact: type(fact).__name__)
def test_what_control_writes_it_reads_back(fact: ControlFact) -> None:
    kind, payload = CODEC.encode(fact)
    assert CODEC.decode(kind, payload) == fact
    assert event_pb2.EventPayload.FromString(payload).WhichOneof("kind") == EventKind(kind).name.lower()


Payload = event_pb2.EventPayload
READ: list[tuple[EventKind, Payload, Fact]] = [
    (
        EventKind.STEP,
        Payload(step=event_pb2.StepEvent(step=3, total_steps=9, epoch=0.5, tokens_per_second=10, remaining_seconds=4)),
        facts.StepFact(step=3, total_steps=9, epoch=0.5, loss=None, tokens_per_second=10, remaining_seconds=4),
    ),
    (
        EventKind.STEP,
        Payload(step=event_pb2.StepEvent(step=1, total_steps=9, loss=0.0)),
        facts.StepFact(step=1, total_steps=9, epoch=0, loss=0.0, tokens_per_second=0, remaining_seconds=0),
    ),
    (
        EventKind.PLAN,
        Payload(plan=plan_pb2.Plan(num_steps=5, weights_digest="w", data_digest="d")),
        facts.PlanFact(num_steps=5, weights_digest="w", data_digest="d"),
    ),
    (
        EventKind.RUN_STATE,
        Payload(run_state=event_pb2.RunStateEvent(state=event_pb2.RUN_STATE_RUNNING)),
        facts.RunStateFact(state=RunState.RUNNING),
    ),
    (
        EventKind.RESUMED,
        Payload(resumed=event_pb2.ResumedEvent(from_step=2, checkpoint="step-00000002")),
        facts.ResumedFact(from_step=2, checkpoint="step-00000002"),
    ),
]


@pytest.mark.parametrize(("kind", "payload", "fact"), READ, ids=lambda value: getattr(value, "name", ""))
def test_facts_of_a_run_are_read(kind: EventKind, payload: Payload, fact: Fact) -> None:
    assert CODEC.decode(kind, payload.SerializeToString()) == fact


@pytest.mark.parametrize("kind", [0, EventKind.LOG, EventKind.REALIZED, 999])
def test_kinds_that_control_does_not_read_are_not_looked_into(kind: int) -> None:
    assert CODEC.decode(kind, b"\xff not a payload") is None


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff",
        b"",
        Payload(log=event_pb2.LogEvent(message="x")).SerializeToString(),
        Payload(run_state=event_pb2.RunStateEvent()).SerializeToString(),
    ],
)
def test_a_payload_that_lies_is_a_named_defect(payload: bytes) -> None:
    with pytest.raises(Internal):
        CODEC.decode(EventKind.RUN_STATE, payload)
