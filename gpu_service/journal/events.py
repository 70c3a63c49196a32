"""Wraps event messages into payloads and names failures. Holds no state and does no input or output."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message

from tunesmith.common.v1 import errors_pb2, event_pb2, plan_pb2

# The oneof's field of each message type: declared once, in the proto.
_FIELD_BY_MESSAGE: Mapping[str, str] = {
    field.message_type.full_name: field.name
    for field in event_pb2.EventPayload.DESCRIPTOR.oneofs_by_name["kind"].fields
    if field.message_type is not None
}

EventMessage = (
    event_pb2.JobStateEvent
    | event_pb2.RunStateEvent
    | event_pb2.PhaseEvent
    | event_pb2.LoadingEvent
    | plan_pb2.Plan
    | event_pb2.StepEvent
    | event_pb2.EvaluationEvent
    | event_pb2.SampleEvent
    | event_pb2.CheckpointEvent
    | event_pb2.ResumedEvent
    | event_pb2.ArtifactEvent
    | event_pb2.WarningEvent
    | event_pb2.LogEvent
    | event_pb2.MemoryReleasedEvent
    | event_pb2.RealizedEvent
    | event_pb2.NodeReachabilityEvent
    | event_pb2.MicroBatchReducedEvent
    | event_pb2.MemoryMeasuredEvent
    | event_pb2.ExportEvent
)


def wrap(message: EventMessage) -> event_pb2.EventPayload:
    """The payload that carries `message`."""
    payload = event_pb2.EventPayload()
    field: Message = getattr(payload, _FIELD_BY_MESSAGE[message.DESCRIPTOR.full_name])
    field.CopyFrom(message)
    # A message without any set field must still be chosen in the oneof.
    field.SetInParent()
    return payload


def kind_of(payload: event_pb2.EventPayload) -> event_pb2.EventKind.ValueType:
    """The kind of a payload: named, and numbered, like the oneof's field that is set. ValueError when none is."""
    name = payload.WhichOneof("kind")
    if name is None:
        raise ValueError("the payload holds no event")
    return event_pb2.EventKind.Value(f"EVENT_KIND_{name.upper()}")


def failure(
    *,
    reason: str,
    fault: str,
    message: str,
    stage: str = "",
    exception_type: str = "",
    file: str = "",
    versions: Mapping[str, str] | None = None,
    details: Mapping[str, str] | None = None,
    exit_status: int | None = None,
    signal: int | None = None,
) -> errors_pb2.Failure:
    """A typed failure. `reason` and `fault` are enum names without their prefix, e.g. `ENGINE_KILLED` and `PLATFORM`.

    Raises ValueError for a name that the contract does not have.
    """
    built = errors_pb2.Failure(
        reason=errors_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}"),
        fault=errors_pb2.Fault.Value(f"FAULT_{fault}"),
        message=message,
        stage=stage,
        exception_type=exception_type,
        file=file,
        versions=versions,
        details=details,
    )
    if exit_status is not None:
        built.exit_status = exit_status
    if signal is not None:
        built.signal = signal
    return built
