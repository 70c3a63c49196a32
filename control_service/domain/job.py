"""A job: one request to train a project, with its immutable spec. Changes only through `job_state`'s table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from control_service.domain.failure import Failure
from control_service.domain.job_state import TERMINAL, JobState, check_transition
from control_service.domain.run import Phase, RunKey, RunState
from control_service.domain.spec import TrainingSpec


class WaitReason(StrEnum):
    """Why a queued job waits; UNSPECIFIED for a job that is not queued, or is next with a free node."""

    UNSPECIFIED = "UNSPECIFIED"
    QUEUE = "QUEUE"
    NO_NODE = "NO_NODE"
    NO_MODEL = "NO_MODEL"
    NODE_BUSY = "NODE_BUSY"
    BACK_OFF = "BACK_OFF"
    DRAINING = "DRAINING"


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """Where a job is. `loss` None: none yet, or not a finite number."""

    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    tokens_per_second: float = 0.0
    remaining_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """The stored record of a job."""

    job_id: str
    project_id: int
    project_name: str
    spec: TrainingSpec
    spec_digest: str
    # Relative, below the output root: `<output_directory>/<job_id>`.
    output_path: str
    create_time: datetime
    priority: int = 0
    max_retries: int = 2
    num_retries: int = 0
    retry_of_job_id: str = ""
    state: JobState = JobState.QUEUED
    phase: Phase = Phase.UNSPECIFIED
    # Attempts dispatched so far; the newest is the fencing epoch.
    attempt: int = 0
    node: str = ""
    node_unreachable: bool = False
    progress: JobProgress = field(default_factory=JobProgress)
    failure: Failure | None = None
    # Pinned at first dispatch; empty until then.
    weights_digest: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None
    # Not dispatched before this time (back-off).
    not_before: datetime | None = None
    # Highest run_sequence of the current attempt that the log holds: the cursor of WatchRun.
    run_cursor: int = 0
    # Newest state that the current attempt's journal told; None before its first event.
    run_state: RunState | None = None
    # Newest sequence in the log; written by the event log alone.
    last_sequence: int = 0
    # Rises with every update; an update of an older revision is refused.
    revision: int = 0

    @property
    def is_over(self) -> bool:
        """True in a terminal state."""
        return self.state in TERMINAL

    @property
    def retries_left(self) -> int:
        """Automatic retries still allowed."""
        return max(0, self.max_retries - self.num_retries)

    def run_key(self, installation_id: str) -> RunKey:
        """Names the current attempt's run."""
        return RunKey(installation_id=installation_id, job_id=self.job_id, attempt=self.attempt)

    def with_state(self, state: JobState) -> Job:
        """The job in another state, by the table: FAILED_PRECONDITION, JOB_STATE when it has no such transition."""
        check_transition(self.state, state)
        return replace(self, state=state)


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A job with its place in the queue: `queue_position` 1 is next, 0 is not queued."""

    job: Job
    queue_position: int = 0
    wait_reason: WaitReason = WaitReason.UNSPECIFIED
    wait_message: str = ""
