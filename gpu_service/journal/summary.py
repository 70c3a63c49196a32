"""What a journal says of its run, folded from its events. Pure but for `summarize`, which reads the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gpu_service.journal.file import Reader
from tunesmith.common.v1 import errors_pb2, event_pb2

TERMINAL_RUN_STATES = frozenset(
    {
        event_pb2.RUN_STATE_SUCCEEDED,
        event_pb2.RUN_STATE_FAILED,
        event_pb2.RUN_STATE_CANCELLED,
        event_pb2.RUN_STATE_INTERRUPTED,
    }
)

_FOLDED_KINDS = frozenset(
    {
        event_pb2.EVENT_KIND_RUN_STATE,
        event_pb2.EVENT_KIND_PHASE,
        event_pb2.EVENT_KIND_PLAN,
        event_pb2.EVENT_KIND_CHECKPOINT,
        event_pb2.EVENT_KIND_ARTIFACT,
        event_pb2.EVENT_KIND_MEMORY_MEASURED,
    }
)


@dataclass(kw_only=True, slots=True)
class RunSummary:
    """A run as its events tell it so far; ACCEPTED before the first."""

    state: event_pb2.RunState.ValueType = event_pb2.RUN_STATE_ACCEPTED
    phase: event_pb2.Phase.ValueType = event_pb2.PHASE_UNSPECIFIED
    last_run_sequence: int = 0
    failure: errors_pb2.Failure | None = None
    artifacts: dict[str, event_pb2.ArtifactEvent] = field(default_factory=dict)
    # Committed and not deleted since, by name.
    checkpoints: dict[str, event_pb2.CheckpointEvent] = field(default_factory=dict)

    # What the run locks of its host's memory, once it is planned.
    host_bytes: int | None = None
    # What memory came to, once training was over.
    memory_measured: event_pb2.MemoryMeasuredEvent | None = None

    @property
    def is_over(self) -> bool:
        return self.state in TERMINAL_RUN_STATES

    @property
    def last_checkpoint(self) -> event_pb2.CheckpointEvent | None:
        """The committed checkpoint of the highest step, or None."""
        return max(self.checkpoints.values(), key=lambda checkpoint: checkpoint.step, default=None)

    def apply(self, event: event_pb2.EncodedEvent) -> None:
        """Fold in the next event."""
        self.last_run_sequence = event.run_sequence
        if event.kind not in _FOLDED_KINDS:
            return
        payload = event_pb2.EventPayload.FromString(event.payload)
        if event.kind == event_pb2.EVENT_KIND_RUN_STATE:
            self.state = payload.run_state.state
            if payload.run_state.HasField("failure"):
                self.failure = payload.run_state.failure
        elif event.kind == event_pb2.EVENT_KIND_PHASE:
            self.phase = payload.phase.phase
        elif event.kind == event_pb2.EVENT_KIND_PLAN:
            self.host_bytes = payload.plan.memory.host_bytes
        elif event.kind == event_pb2.EVENT_KIND_MEMORY_MEASURED:
            self.memory_measured = payload.memory_measured
        elif event.kind == event_pb2.EVENT_KIND_ARTIFACT:
            self.artifacts[payload.artifact.name] = payload.artifact
        elif payload.checkpoint.status == event_pb2.CHECKPOINT_STATUS_DELETED:
            self.checkpoints.pop(payload.checkpoint.name, None)
        else:
            self.checkpoints[payload.checkpoint.name] = payload.checkpoint


def summarize(path: Path) -> RunSummary:
    """Read a whole journal. A journal that is not there yet is a run that was only accepted. Raises OSError."""
    summary = RunSummary()
    try:
        reader = Reader(path)
    except FileNotFoundError:
        return summary
    with reader:
        while records := reader.read(summary.last_run_sequence, limit=4096):
            for record in records:
                summary.apply(record.decode())
    return summary
