"""What one transaction touched, gathered while it runs and told after its commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from control_service.domain.event import StoredEvent


@dataclass(kw_only=True)
class Touched:
    """Filled by repositories; empty again for the next transaction."""

    job_sequences: dict[str, int] = field(default_factory=dict)
    jobs: bool = False
    moved_jobs: set[str] = field(default_factory=set)
    nodes: bool = False
    # By job, what was appended to its log.
    events: dict[str, list[StoredEvent]] = field(default_factory=dict)

    def append(self, job_id: str, events: Sequence[StoredEvent]) -> None:
        """A job's log grew by numbered events."""
        self.job_sequences[job_id] = events[-1].sequence
        self.events.setdefault(job_id, []).extend(events)

    def move(self, job_id: str) -> None:
        """A job was made, deleted or moved."""
        self.jobs = True
        self.moved_jobs.add(job_id)

    def merge(self, other: Touched) -> None:
        """Adds what another transaction of the same commit touched."""
        for job_id, events in other.events.items():
            self.append(job_id, events)
        self.jobs |= other.jobs
        self.moved_jobs |= other.moved_jobs
        self.nodes |= other.nodes

    def clear(self) -> None:
        """Forgets what was touched."""
        self.job_sequences.clear()
        self.events.clear()
        self.moved_jobs.clear()
        self.jobs = self.nodes = False

    def __bool__(self) -> bool:
        return bool(self.job_sequences) or bool(self.moved_jobs) or self.nodes
