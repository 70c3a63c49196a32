"""What a training has done so far: counts, seconds and history. It goes into checkpoints and the report as JSON.

Counts are of what was really fed to the model; at the end they must equal the plan's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from gpu_service.engine.training.batches import MicroBatch


@dataclass(kw_only=True)
class SourceCount:
    """What one source gave, over the whole run and within the first epoch (the plan's unit)."""

    num_examples: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    epoch_examples: int = 0
    epoch_tokens: int = 0
    epoch_target_tokens: int = 0


@dataclass(kw_only=True)
class TrainingProgress:
    """`steps_done` steps are in the weights. Lists hold one JSON object an entry, oldest first."""

    steps_done: int = 0
    training_seconds: float = 0.0
    counts: dict[int, SourceCount] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    # Lowest held-out loss that a checkpoint of this training had; None before there was one.
    best_held_out_loss: float | None = None

    @property
    def num_examples(self) -> int:
        return sum(count.num_examples for count in self.counts.values())

    @property
    def num_tokens(self) -> int:
        return sum(count.num_tokens for count in self.counts.values())

    @property
    def num_target_tokens(self) -> int:
        return sum(count.num_target_tokens for count in self.counts.values())

    def count(self, batch: MicroBatch, examples_per_epoch: int) -> None:
        """Count a micro-batch that was trained on."""
        seen = self.num_examples
        for place, source in enumerate(batch.sources):
            tokens, targets = batch.tokens_by_example[place], batch.targets_by_example[place]
            count = self.counts.setdefault(source, SourceCount())
            count.num_examples += 1
            count.num_tokens += tokens
            count.num_target_tokens += targets
            if seen + place < examples_per_epoch:
                count.epoch_examples += 1
                count.epoch_tokens += tokens
                count.epoch_target_tokens += targets

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> TrainingProgress:
        """Raises KeyError, TypeError, ValueError for what `to_json` did not write."""
        counts = {int(source): SourceCount(**count) for source, count in document["counts"].items()}
        return cls(**(document | {"counts": counts}))
