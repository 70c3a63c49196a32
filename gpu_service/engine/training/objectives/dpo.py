"""`dpo`: direct preference optimization (Rafailov et al. 2023). A pair counts once, whatever its length.

The reference is the same model with its adapter switched off, so that it costs a forward pass and no memory. It is
measured anew for every pair of every step: a value kept from an earlier pass would differ in its last bits from one
measured in another, and a resumed run from an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from gpu_service.engine.training.batches import MicroBatch
from gpu_service.engine.training.likelihood import nats_by_sequence
from gpu_service.engine.training.modes import measuring
from gpu_service.engine.training.objectives.objective import Objective, Outcome
from tunesmith.common.v1 import training_spec_pb2


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Mean over pairs of -log sigmoid(margin), the margin being the chosen answer's reward less the rejected one's.

    A reward is `beta` times how much likelier the answer became, in nats. With `label_smoothing` each label counts as
    wrong with that probability (conservative DPO).
    """

    beta: float
    label_smoothing: float

    def weights(self, batch: MicroBatch) -> tuple[int, ...]:
        return (1,) * len(batch.sources)

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        """`model` is a PEFT model and every example a pair. Columns: loss, reward of chosen and of rejected."""
        # First the reference: switching the adapter off in between would take the gradient of what was done before.
        with measuring(model), model.disable_adapter():
            reference = nats_by_sequence(model, batch)
        rewards = self.beta * (reference - nats_by_sequence(model, batch)).unflatten(0, (-1, 2))
        losses = self.losses(rewards)
        return Outcome(total=losses.sum(), values=torch.cat([losses[:, None], rewards], dim=1).detach())

    def losses(self, rewards: torch.Tensor) -> torch.Tensor:
        """Loss of each pair [n] from its rewards [n, 2], the chosen answer's first."""
        margins = rewards[:, 0] - rewards[:, 1]
        right, wrong = functional.logsigmoid(margins), functional.logsigmoid(-margins)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong


def build(settings: training_spec_pb2.Hyperparameters) -> Objective:
    """Takes `settings.dpo`, every field of it resolved."""
    return Preference(beta=settings.dpo.beta, label_smoothing=settings.dpo.label_smoothing)
