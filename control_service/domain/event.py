"""Events of a job's log: the stored envelope with its opaque payload, and the facts that control reads or writes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import TypeAlias

from control_service.domain.artifact import ArtifactKind, CheckpointStatus, FileReference
from control_service.domain.failure import Failure
from control_service.domain.job_state import JobState
from control_service.domain.run import Phase, RunState


class EventKind(IntEnum):
    """Kinds by the numbers of the contract; a contract test holds them to the proto enum."""

    JOB_STATE = 1
    RUN_STATE = 2
    PHASE = 3
    LOADING = 4
    PLAN = 5
    STEP = 6
    EVALUATION = 7
    SAMPLE = 8
    CHECKPOINT = 9
    RESUMED = 10
    ARTIFACT = 11
    WARNING = 12
    LOG = 13
    MEMORY_RELEASED = 14
    REALIZED = 15
    NODE_REACHABILITY = 16
    MICRO_BATCH_REDUCED = 17
    MEMORY_MEASURED = 18
    EXPORT = 19


@dataclass(frozen=True, kw_only=True)
class StoredEvent:
    """One event. `sequence` is 0 until control stored it; `run_sequence` is 0 for events that control wrote.

    `kind` is a plain number: one that this version does not know is stored and passed on like any other.
    """

    sequence: int
    attempt: int
    run_sequence: int
    kind: int
    time: datetime
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class JobStateFact:
    """A job changed its state. Written by control. `previous_state` None: the job was made."""

    previous_state: JobState | None
    state: JobState
    message: str = ""
    failure: Failure | None = None
    node: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeReachabilityFact:
    """Control lost or regained the job's node. Written by control."""

    node: str
    reachable: bool


@dataclass(frozen=True, kw_only=True)
class WarningFact:
    """Something worth knowing; `code` is kebab-case."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class RunStateFact:
    """A run changed its state."""

    state: RunState
    previous_state: RunState | None = None
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class PhaseFact:
    """A run entered a phase; COLLECTING is control's."""

    phase: Phase


@dataclass(frozen=True, kw_only=True)
class PlanFact:
    """The exact plan a run trains by, as far as control needs it."""

    num_steps: int
    weights_digest: str
    data_digest: str


@dataclass(frozen=True, kw_only=True)
class StepFact:
    """An optimizer step was done. `loss` None: not a finite number."""

    step: int
    total_steps: int
    epoch: float
    loss: float | None
    tokens_per_second: float
    remaining_seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointFact:
    """A checkpoint was committed (by the run), or replicated or deleted (by control)."""

    name: str
    step: int
    status: CheckpointStatus
    size_bytes: int
    manifest_sha256: str
    files: tuple[FileReference, ...]
    seconds: float = 0.0
    probe_loss: float | None = None
    held_out_loss: float | None = None
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class ResumedFact:
    """Training goes on after `from_step`."""

    from_step: int
    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class ArtifactFact:
    """An artifact was written on the node, or (`collected`) verified in control's store."""

    name: str
    kind: ArtifactKind
    files: tuple[FileReference, ...]
    collected: bool = False


Fact: TypeAlias = (
    JobStateFact
    | NodeReachabilityFact
    | WarningFact
    | RunStateFact
    | PhaseFact
    | PlanFact
    | StepFact
    | CheckpointFact
    | ResumedFact
    | ArtifactFact
)
# What control itself writes into a log.
ControlFact: TypeAlias = JobStateFact | NodeReachabilityFact | WarningFact | PhaseFact | CheckpointFact | ArtifactFact
