"""Held-out loss by trait and dataset. Changes no weight and no random state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from gpu_service.domain.planned_data import ExampleReference, PlannedData
from gpu_service.engine.stopping import StopSwitch
from gpu_service.engine.training.batches import MicroBatchLimit, collate, split
from gpu_service.engine.training.flat_attention import attending_within_sequences
from gpu_service.engine.training.losses import LossTally, as_json, finite, preference_as_json
from gpu_service.engine.training.modes import measuring
from gpu_service.engine.training.objectives import Objective
from tunesmith.common.v1 import event_pb2


def evaluate(
    model: Any,
    data: PlannedData,
    references: Sequence[ExampleReference],
    *,
    objective: Objective,
    device: torch.device,
    limit: MicroBatchLimit,
    moment: event_pb2.EvaluationMoment.ValueType,
    step: int,
    switch: StopSwitch,
) -> event_pb2.EvaluationEvent | None:
    """Loss over these examples; None when there are none. Raises StopRequested between batches."""
    if not references:
        return None
    start = time.monotonic()
    tally = LossTally()
    with measuring(model), attending_within_sequences(model):
        for part in split(data, references, limit):
            switch.check()
            batch = collate(data, part)
            outcome = objective.forward(model, batch.to(device))
            tally.add(batch, objective.weights(batch), outcome.values.tolist(), data.sources)
    return event_pb2.EvaluationEvent(
        moment=moment,
        step=step,
        loss=finite(tally.mean),
        losses=[*tally.by_trait(), *tally.by_dataset()],
        preference=tally.preference(),
        seconds=time.monotonic() - start,
    )


def as_history(event: event_pb2.EvaluationEvent) -> dict[str, Any]:
    """The same for the report."""
    return {
        "moment": event_pb2.EvaluationMoment.Name(event.moment).removeprefix("EVALUATION_MOMENT_"),
        "step": event.step,
        "loss": event.loss if event.HasField("loss") else None,
        "losses": as_json(event.losses),
        "preference": preference_as_json(event.preference if event.HasField("preference") else None),
        "seconds": event.seconds,
    }
