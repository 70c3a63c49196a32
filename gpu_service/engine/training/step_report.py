"""What an event and the report say of a step. Reads what was measured; measures nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_service.domain.planned_data import PlannedData
from gpu_service.engine.training.batches import MicroBatch
from gpu_service.engine.training.losses import LossTally, as_json, finite, preference_as_json
from tunesmith.common.v1 import event_pb2

# Steps whose mean time the estimate of the rest is made from.
_ESTIMATE_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """A step that is over. `step` counts from 0; `norm` is the gradient's before clipping."""

    step: int
    batches: Sequence[MicroBatch]
    tally: LossTally
    norm: float
    learning_rate: float
    seconds: float
    peak_memory_bytes: int
    skipped: bool


@dataclass(kw_only=True)
class StepReport:
    """Makes the event of each step; remembers how long the last ones took."""

    data: PlannedData
    _recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_ESTIMATE_STEPS))

    def describe(self, facts: StepFacts) -> event_pb2.StepEvent:
        """The STEP event."""
        self._recent_seconds.append(facts.seconds)
        mean_seconds = sum(self._recent_seconds) / len(self._recent_seconds)
        num_tokens = sum(batch.num_tokens for batch in facts.batches)
        done = facts.step + 1
        return event_pb2.StepEvent(
            step=done,
            total_steps=self.data.num_steps,
            epoch=self.data.epoch_of_step(done),
            loss=finite(facts.tally.mean),
            trait_losses=facts.tally.by_trait(),
            dataset_losses=facts.tally.by_dataset(),
            preference=facts.tally.preference(),
            learning_rate=facts.learning_rate,
            gradient_norm=finite(facts.norm),
            num_tokens=num_tokens,
            num_target_tokens=facts.tally.num_target_tokens,
            num_examples=sum(len(batch.sources) for batch in facts.batches),
            tokens_per_second=num_tokens / max(facts.seconds, 1e-9),
            step_seconds=facts.seconds,
            peak_memory_bytes=facts.peak_memory_bytes,
            remaining_seconds=mean_seconds * (self.data.num_steps - done),
            skipped=facts.skipped,
        )


def as_history(event: event_pb2.StepEvent) -> dict[str, Any]:
    """The same for the report."""
    return {
        "step": event.step,
        "loss": event.loss if event.HasField("loss") else None,
        "trait_losses": as_json(event.trait_losses),
        "dataset_losses": as_json(event.dataset_losses),
        "preference": preference_as_json(event.preference if event.HasField("preference") else None),
        "learning_rate": event.learning_rate,
        "gradient_norm": event.gradient_norm if event.HasField("gradient_norm") else None,
        "num_tokens": event.num_tokens,
        "num_target_tokens": event.num_target_tokens,
        "step_seconds": event.step_seconds,
        "skipped": event.skipped,
    }
