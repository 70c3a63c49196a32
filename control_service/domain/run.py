"""A run as its node reports it: one attempt at a job on one node. Mirrors `tunesmith.gpu.v1.Run`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from control_service.domain.artifact import ArtifactKind, FileReference
from control_service.domain.failure import Failure


class RunState(StrEnum):
    """States of a run on its node."""

    ACCEPTED = "ACCEPTED"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    INTERRUPTED = "INTERRUPTED"


RUN_OVER: frozenset[RunState] = frozenset(
    {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.INTERRUPTED}
)


class Phase(StrEnum):
    """What a run is doing; UNSPECIFIED between attempts."""

    UNSPECIFIED = "UNSPECIFIED"
    PLANNING = "PLANNING"
    LOADING = "LOADING"
    EVALUATING = "EVALUATING"
    TRAINING = "TRAINING"
    SAVING = "SAVING"
    COLLECTING = "COLLECTING"


class StopMode(StrEnum):
    """How a run is to end."""

    CANCEL = "CANCEL"
    CHECKPOINT = "CHECKPOINT"


@dataclass(frozen=True, kw_only=True)
class RunKey:
    """Names one attempt. `attempt` is the fencing epoch, from 1."""

    installation_id: str
    job_id: str
    attempt: int


@dataclass(frozen=True, kw_only=True)
class RunArtifact:
    """An artifact that lies on the node."""

    name: str
    kind: ArtifactKind
    files: tuple[FileReference, ...]


@dataclass(frozen=True, kw_only=True)
class ObservedRun:
    """What a node says of one run."""

    key: RunKey
    spec_digest: str
    state: RunState
    phase: Phase = Phase.UNSPECIFIED
    last_run_sequence: int = 0
    failure: Failure | None = None
    artifacts: tuple[RunArtifact, ...] = ()
    # Newest committed checkpoint; empty if none.
    last_checkpoint: str = ""
    last_checkpoint_step: int = 0
    weights_digest: str = ""

    @property
    def is_over(self) -> bool:
        """True when the node will not change it any more."""
        return self.state in RUN_OVER


@dataclass(frozen=True, kw_only=True)
class ResumeFrom:
    """A checkpoint to go on from: in the earlier attempt's directory, or, with `files`, in the node's blob store."""

    checkpoint: str
    step: int
    attempt: int
    files: tuple[FileReference, ...] = ()
