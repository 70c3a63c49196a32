"""The probe batch: a few planned examples whose loss a checkpoint writes down and a resumed run measures again.

Always the same ones for the same plan. Changes no weight, no random state and no training bit.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_service.domain.planned_data import ExampleReference, PlannedData
from gpu_service.engine.training.batches import collate
from gpu_service.engine.training.flat_attention import attending_within_sequences
from gpu_service.engine.training.losses import finite
from gpu_service.engine.training.modes import measuring
from gpu_service.engine.training.objectives import Objective

# Enough to see a model that is another one, and little beside a training step.
_MAX_EXAMPLES = 4
_MAX_TOKENS = 2048


def choose_probe(data: PlannedData) -> list[ExampleReference]:
    """The first examples of the first step: at least one, at most `_MAX_EXAMPLES` of `_MAX_TOKENS` together."""
    chosen: list[ExampleReference] = []
    num_tokens = 0
    for reference in data.step_examples(0)[:_MAX_EXAMPLES]:
        num_tokens += len(data.example(reference).tokens)
        if chosen and num_tokens > _MAX_TOKENS:
            break
        chosen.append(reference)
    return chosen


def measure_probe(model: Any, data: PlannedData, objective: Objective, device: torch.device) -> float | None:
    """The objective's mean over the probe; None when that is not a finite number.

    One example a pass: no pass is larger than the smallest that training can have.
    """
    loss, weight = 0.0, 0
    with measuring(model), attending_within_sequences(model):
        for reference in choose_probe(data):
            batch = collate(data, [reference])
            loss += objective.forward(model, batch.to(device)).values[0, 0].item()
            weight += sum(objective.weights(batch))
    return finite(loss / weight)
