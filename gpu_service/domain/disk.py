"""What a run will keep on its node's disk, by arithmetic on its plan. Measures nothing and refuses nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpu_service.domain.checked_plan import CheckedPlan

_TRAINED_BYTES = 4
# Tokenizer, cards, report, manifests and the journal.
_BESIDE_BYTES = 2 * 1024**2


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskEstimate:
    """Bytes."""

    checkpoint_bytes: int
    artifact_bytes: int
    # Checkpoints that are on the disk at once: those that are kept, and the one that is being written.
    num_checkpoints: int

    @property
    def least_bytes(self) -> int:
        """Without these the run could leave nothing."""
        return self.checkpoint_bytes + self.artifact_bytes

    @property
    def most_bytes(self) -> int:
        """At the run's end, with every checkpoint that it keeps."""
        return self.num_checkpoints * self.checkpoint_bytes + self.artifact_bytes


def estimate_disk(plan: CheckedPlan) -> DiskEstimate:
    """Of trained weights in float32, the optimizer's state, and whole models in the size of the base's own files. A run
    that only exports has no checkpoint.
    """
    settings = plan.hyperparameters
    trained = plan.num_trainable_parameters if plan.num_steps else 0
    state = math.ceil(plan.optimizer.state_bytes_per_parameter * trained)
    base_bytes = plan.base_model.size_bytes
    artifact = trained * _TRAINED_BYTES if plan.method.trains_adapter else base_bytes
    merged = base_bytes if "merged" in settings.exports else 0
    kept = min(settings.keep_checkpoints + int(settings.keep_best_checkpoint), _num_saves(plan))
    return DiskEstimate(
        checkpoint_bytes=trained * _TRAINED_BYTES + state,
        artifact_bytes=artifact + merged + _BESIDE_BYTES,
        num_checkpoints=min(kept + 1, _num_saves(plan)),
    )


def _num_saves(plan: CheckedPlan) -> int:
    interval = plan.hyperparameters.save_every_steps
    return 1 + (max(plan.num_steps - 1, 0) // interval if interval else 0)
