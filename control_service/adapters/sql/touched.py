"""What one transaction touched, gathered while it runs and told after its commit."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Touched:
    """Filled by repositories; empty again for the next transaction."""

    job_sequences: dict[str, int] = field(default_factory=dict)
    jobs: bool = False
    nodes: bool = False

    def merge(self, other: Touched) -> None:
        """Adds what another transaction of the same commit touched."""
        self.job_sequences.update(other.job_sequences)
        self.jobs |= other.jobs
        self.nodes |= other.nodes

    def __bool__(self) -> bool:
        return bool(self.job_sequences) or self.jobs or self.nodes
