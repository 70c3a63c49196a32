"""An event codec whose payloads are pickled facts, and whose pages are pickled events."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

from control_service.domain.errors import Internal
from control_service.domain.event import (
    ArtifactFact,
    CheckpointFact,
    EventKind,
    Fact,
    JobStateFact,
    NodeReachabilityFact,
    PhaseFact,
    PlanFact,
    ResumedFact,
    RunStateFact,
    StepFact,
    StoredEvent,
    WarningFact,
)

KINDS: dict[type, EventKind] = {
    JobStateFact: EventKind.JOB_STATE,
    NodeReachabilityFact: EventKind.NODE_REACHABILITY,
    WarningFact: EventKind.WARNING,
    RunStateFact: EventKind.RUN_STATE,
    PhaseFact: EventKind.PHASE,
    PlanFact: EventKind.PLAN,
    StepFact: EventKind.STEP,
    CheckpointFact: EventKind.CHECKPOINT,
    ResumedFact: EventKind.RESUMED,
    ArtifactFact: EventKind.ARTIFACT,
}


class PickleCodec:
    """Implements `EventCodec`."""

    def __init__(self) -> None:
        self.num_pages = 0

    def encode(self, fact: Fact) -> tuple[int, bytes]:
        return int(KINDS[type(fact)]), pickle.dumps(fact)

    def decode(self, kind: int, payload: bytes) -> Fact | None:
        if kind not in set(KINDS.values()):
            return None
        if not self.is_payload(payload):
            raise Internal("INTERNAL", "the payload cannot be read")
        return pickle.loads(payload)

    def is_payload(self, payload: bytes) -> bool:
        return payload.startswith(b"\x80")

    def encode_page(self, events: Sequence[StoredEvent]) -> bytes:
        self.num_pages += 1
        return pickle.dumps(list(events))

    def encode_heartbeat(self, position: int) -> bytes:
        return pickle.dumps(position)


def page_of(message: bytes) -> list[StoredEvent]:
    """The events of a page; none for a heartbeat."""
    value = pickle.loads(message)
    return value if isinstance(value, list) else []
