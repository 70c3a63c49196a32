"""`sft`: the likelihood of target tokens. An example counts as many times as it has targets."""

from __future__ import annotations

from typing import Any

from gpu_service.engine.training.batches import MicroBatch
from gpu_service.engine.training.likelihood import nats_by_sequence
from gpu_service.engine.training.objectives.objective import Objective, Outcome
from tunesmith.common.v1 import training_spec_pb2


class Likelihood:
    """Nats per target token."""

    def weights(self, batch: MicroBatch) -> tuple[int, ...]:
        return batch.targets_by_example

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        nats = nats_by_sequence(model, batch)
        return Outcome(total=nats.sum(), values=nats.detach()[:, None])


def build(settings: training_spec_pb2.Hyperparameters) -> Objective:
    """Takes no settings."""
    del settings
    return Likelihood()
