"""A run of the simulation: what a node keeps of one attempt on its disk, and the script that it goes by."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from control_service.app.ports import StartRun
from control_service.domain.artifact import FileReference
from control_service.domain.event import StoredEvent
from control_service.domain.failure import Failure
from control_service.domain.run import ObservedRun, RunState, StopMode

WEIGHTS_DIGEST = "w" * 64


@dataclass(frozen=True, kw_only=True)
class Script:
    """How an attempt goes if nothing happens to it."""

    num_steps: int
    step_seconds: float
    save_every: int
    # Fails once this step is reached; 0: it does not.
    fail_at_step: int = 0
    failure: Failure | None = None
    # Seconds that a stop takes beyond the step.
    stop_seconds: float = 0.0


@dataclass(eq=False)
class SimRun:
    """One attempt on the node's disk, with its journal."""

    request: StartRun
    script: Script
    device_id: str
    state: RunState = RunState.ACCEPTED
    step: int = 0
    journal: list[StoredEvent] = field(default_factory=list)
    failure: Failure | None = None
    stop: StopMode | None = None
    checkpoints: dict[str, FileReference] = field(default_factory=dict)
    # A power loss cut events off that somebody may have read.
    torn: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        """True once the journal has the outcome."""
        return self.state in (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.INTERRUPTED)

    @property
    def name(self) -> str:
        """`<job>/<attempt>`."""
        return f"{self.request.key.job_id}/{self.request.key.attempt}"

    def observed(self) -> ObservedRun:
        """What the node says of it."""
        return ObservedRun(
            key=self.request.key,
            spec_digest=self.request.spec_digest,
            state=self.state,
            last_run_sequence=len(self.journal),
            failure=self.failure,
            weights_digest=WEIGHTS_DIGEST,
        )
