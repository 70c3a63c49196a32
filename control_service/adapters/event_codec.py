"""Implements `app.ports.EventCodec` with the contract's messages. Reads payloads only for the facts control needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError

from control_service.domain import event as facts
from control_service.domain.artifact import ArtifactKind, CheckpointStatus
from control_service.domain.errors import Internal
from control_service.domain.event import ControlFact, EventKind, Fact, StoredEvent
from control_service.domain.job_state import JobState
from control_service.domain.run import Phase, RunState
from control_service.wire.values import (
    enum_name,
    enum_number,
    failure_message,
    failure_value,
    file_messages,
    file_values,
    timestamp,
)
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith.gpu.v1 import run_service_pb2

Payload = event_pb2.EventPayload


class ProtoEventCodec:
    """Holds no state."""

    def encode(self, fact: ControlFact) -> tuple[int, bytes]:
        """(event kind number, serialized EventPayload)."""
        kind, to_payload = _ENCODERS[type(fact)]
        return int(kind), to_payload(fact).SerializeToString(deterministic=True)

    def decode(self, kind: int, payload: bytes) -> Fact | None:
        """The fact of a payload; None for a kind that control does not read or know. Internal: not a payload."""
        decoder = _DECODERS.get(kind)
        if decoder is None:
            return None
        try:
            message = Payload.FromString(payload)
            if message.WhichOneof("kind") != EventKind(kind).name.lower():
                raise ValueError(f"it carries {message.WhichOneof('kind')}")
            return decoder(message)
        except (DecodeError, ValueError) as error:
            raise Internal("INTERNAL", f"the payload of an event of kind {kind} cannot be read: {error}") from error

    def is_payload(self, payload: bytes) -> bool:
        """False for bytes that are no EventPayload."""
        try:
            Payload.FromString(payload)
        except DecodeError:
            return False
        return True

    def encode_page(self, events: Sequence[StoredEvent]) -> bytes:
        """A serialized WatchJobResponse with these events; payload bytes are copied, never read."""
        # WatchRunResponse is WatchJobResponse with its events still encoded: the same field number on the wire, which
        # a contract test holds.
        return run_service_pb2.WatchRunResponse(events=[_encoded(event) for event in events]).SerializeToString()

    def encode_heartbeat(self, position: int) -> bytes:
        """A serialized WatchJobResponse with a heartbeat."""
        return job_service_pb2.WatchJobResponse(
            heartbeat=job_service_pb2.Heartbeat(position=position)
        ).SerializeToString()


def _encoded(event: StoredEvent) -> event_pb2.EncodedEvent:
    return event_pb2.EncodedEvent(
        sequence=event.sequence,
        attempt=event.attempt,
        run_sequence=event.run_sequence,
        # Enums are open on the wire: a kind that this version does not know is passed on as its number.
        kind=event.kind,  # type: ignore[arg-type]
        time=timestamp(event.time),
        payload=event.payload,
    )


def _job_state(fact: facts.JobStateFact) -> Payload:
    previous = fact.previous_state.value if fact.previous_state else "UNSPECIFIED"
    return Payload(
        job_state=event_pb2.JobStateEvent(
            previous_state=enum_number(event_pb2.JobState, previous),
            state=enum_number(event_pb2.JobState, fact.state.value),
            message=fact.message,
            failure=failure_message(fact.failure),
            node=fact.node,
        )
    )


def _node_reachability(fact: facts.NodeReachabilityFact) -> Payload:
    return Payload(node_reachability=event_pb2.NodeReachabilityEvent(node=fact.node, reachable=fact.reachable))


def _warning(fact: facts.WarningFact) -> Payload:
    return Payload(warning=event_pb2.WarningEvent(code=fact.code, message=fact.message))


def _phase(fact: facts.PhaseFact) -> Payload:
    return Payload(phase=event_pb2.PhaseEvent(phase=enum_number(event_pb2.Phase, fact.phase.value)))


def _checkpoint(fact: facts.CheckpointFact) -> Payload:
    return Payload(
        checkpoint=event_pb2.CheckpointEvent(
            name=fact.name,
            step=fact.step,
            status=enum_number(event_pb2.CheckpointStatus, fact.status.value),
            size_bytes=fact.size_bytes,
            manifest_sha256=fact.manifest_sha256,
            files=file_messages(fact.files),
            seconds=fact.seconds,
            probe_loss=fact.probe_loss,
            held_out_loss=fact.held_out_loss,
            best=fact.best,
        )
    )


def _artifact(fact: facts.ArtifactFact) -> Payload:
    return Payload(
        artifact=event_pb2.ArtifactEvent(
            name=fact.name,
            kind=enum_number(event_pb2.ArtifactKind, fact.kind.value),
            files=file_messages(fact.files),
            collected=fact.collected,
        )
    )


_ENCODERS: Final[Mapping[type, tuple[EventKind, Callable[[Any], Payload]]]] = {
    facts.JobStateFact: (EventKind.JOB_STATE, _job_state),
    facts.NodeReachabilityFact: (EventKind.NODE_REACHABILITY, _node_reachability),
    facts.WarningFact: (EventKind.WARNING, _warning),
    facts.PhaseFact: (EventKind.PHASE, _phase),
    facts.CheckpointFact: (EventKind.CHECKPOINT, _checkpoint),
    facts.ArtifactFact: (EventKind.ARTIFACT, _artifact),
}


def _read_job_state(payload: Payload) -> Fact:
    event = payload.job_state
    return facts.JobStateFact(
        previous_state=JobState(enum_name(event_pb2.JobState, event.previous_state)) if event.previous_state else None,
        state=JobState(enum_name(event_pb2.JobState, event.state)),
        message=event.message,
        failure=failure_value(event.failure) if event.HasField("failure") else None,
        node=event.node,
    )


def _read_run_state(payload: Payload) -> Fact:
    event = payload.run_state
    return facts.RunStateFact(
        state=RunState(enum_name(event_pb2.RunState, event.state)),
        previous_state=RunState(enum_name(event_pb2.RunState, event.previous_state)) if event.previous_state else None,
        failure=failure_value(event.failure) if event.HasField("failure") else None,
    )


def _read_phase(payload: Payload) -> Fact:
    return facts.PhaseFact(phase=Phase(enum_name(event_pb2.Phase, payload.phase.phase)))


def _read_plan(payload: Payload) -> Fact:
    plan = payload.plan
    return facts.PlanFact(num_steps=plan.num_steps, weights_digest=plan.weights_digest, data_digest=plan.data_digest)


def _read_step(payload: Payload) -> Fact:
    event = payload.step
    return facts.StepFact(
        step=event.step,
        total_steps=event.total_steps,
        epoch=event.epoch,
        loss=event.loss if event.HasField("loss") else None,
        tokens_per_second=event.tokens_per_second,
        remaining_seconds=event.remaining_seconds,
    )


def _read_checkpoint(payload: Payload) -> Fact:
    event = payload.checkpoint
    return facts.CheckpointFact(
        name=event.name,
        step=event.step,
        status=CheckpointStatus(enum_name(event_pb2.CheckpointStatus, event.status)),
        size_bytes=event.size_bytes,
        manifest_sha256=event.manifest_sha256,
        files=file_values(event.files),
        seconds=event.seconds,
        probe_loss=event.probe_loss if event.HasField("probe_loss") else None,
        held_out_loss=event.held_out_loss if event.HasField("held_out_loss") else None,
        best=event.best,
    )


def _read_resumed(payload: Payload) -> Fact:
    return facts.ResumedFact(from_step=payload.resumed.from_step, checkpoint=payload.resumed.checkpoint)


def _read_artifact(payload: Payload) -> Fact:
    event = payload.artifact
    return facts.ArtifactFact(
        name=event.name,
        kind=ArtifactKind(enum_name(event_pb2.ArtifactKind, event.kind)),
        files=file_values(event.files),
        collected=event.collected,
    )


def _read_warning(payload: Payload) -> Fact:
    return facts.WarningFact(code=payload.warning.code, message=payload.warning.message)


def _read_node_reachability(payload: Payload) -> Fact:
    event = payload.node_reachability
    return facts.NodeReachabilityFact(node=event.node, reachable=event.reachable)


_DECODERS: Final[Mapping[int, Callable[[Payload], Fact]]] = {
    EventKind.JOB_STATE: _read_job_state,
    EventKind.RUN_STATE: _read_run_state,
    EventKind.PHASE: _read_phase,
    EventKind.PLAN: _read_plan,
    EventKind.STEP: _read_step,
    EventKind.CHECKPOINT: _read_checkpoint,
    EventKind.RESUMED: _read_resumed,
    EventKind.ARTIFACT: _read_artifact,
    EventKind.WARNING: _read_warning,
    EventKind.NODE_REACHABILITY: _read_node_reachability,
}
