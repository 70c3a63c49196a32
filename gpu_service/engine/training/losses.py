"""Negative log-likelihood of target tokens, and its sums by source.

Sums, not means: means are taken once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from gpu_service.domain.planned_data import Source
from gpu_service.engine.training.batches import MicroBatch
from tunesmith.common.v1 import event_pb2


def sum_by_row(model: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward pass: the sum over all target tokens (a scalar with gradient), and the sums by row (without).

    Logits are made only at positions before a target of some row, in float32. Nats.
    """
    # The logits at a position speak of the next token.
    targets_ahead = batch.is_target[:, 1:]
    positions = targets_ahead.any(dim=0).nonzero().squeeze(1)
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=positions, use_cache=False
    )
    wanted = targets_ahead[:, positions]
    rows = wanted.nonzero()[:, 0]
    logits = output.logits[wanted].float()
    labels = batch.input_ids[:, 1:][:, positions][wanted]
    nats = functional.cross_entropy(logits, labels, reduction="none")
    by_row = torch.zeros(len(batch.sources), dtype=torch.float64, device=nats.device)
    by_row.index_add_(0, rows, nats.detach().double())
    return nats.sum(), by_row


@dataclass(kw_only=True)
class LossTally:
    """Sums of nats and of target tokens by (trait, dataset)."""

    nats: dict[tuple[str, int], float]
    targets: dict[tuple[str, int], int]

    @classmethod
    def empty(cls) -> LossTally:
        return cls(nats={}, targets={})

    def add(self, batch: MicroBatch, by_row: Sequence[float], sources: Sequence[Source]) -> None:
        """Add one micro-batch: `by_row` as `sum_by_row` gave it, on the host."""
        targets = batch.is_target.sum(dim=1).tolist()
        for row, source_index in enumerate(batch.sources):
            source = sources[source_index]
            key = (source.trait_type, source.dataset_id)
            self.nats[key] = self.nats.get(key, 0.0) + by_row[row]
            self.targets[key] = self.targets.get(key, 0) + int(targets[row])

    @property
    def num_target_tokens(self) -> int:
        return sum(self.targets.values())

    @property
    def mean(self) -> float:
        """Nats per target token over everything; not a number when there is no target."""
        return _mean(sum(self.nats.values()), self.num_target_tokens)

    def by_trait(self) -> list[event_pb2.LossValue]:
        """One value a trait, in order of first appearance. Weighted by target tokens they add up to `mean`."""
        nats: dict[str, float] = {}
        targets: dict[str, int] = {}
        for (trait, _), value in self.nats.items():
            nats[trait] = nats.get(trait, 0.0) + value
        for (trait, _), count in self.targets.items():
            targets[trait] = targets.get(trait, 0) + count
        return [_loss_value(trait, 0, nats[trait], targets[trait]) for trait in nats]

    def by_dataset(self) -> list[event_pb2.LossValue]:
        """One value a dataset of each trait."""
        return [
            _loss_value(trait, dataset, nats, self.targets[trait, dataset])
            for (trait, dataset), nats in self.nats.items()
        ]


def finite(value: float) -> float | None:
    """`value`, or None when it is not a finite number: unset on the wire."""
    return value if math.isfinite(value) else None


def as_json(values: Sequence[event_pb2.LossValue]) -> list[Mapping[str, Any]]:
    """Loss values for the report."""
    return [
        {
            "trait_type": value.trait_type,
            "dataset_id": value.dataset_id,
            "loss": value.loss if value.HasField("loss") else None,
            "num_target_tokens": value.num_target_tokens,
        }
        for value in values
    ]


def _mean(nats: float, targets: int) -> float:
    return nats / targets if targets else math.nan


def _loss_value(trait: str, dataset: int, nats: float, targets: int) -> event_pb2.LossValue:
    return event_pb2.LossValue(
        trait_type=trait, dataset_id=dataset, loss=finite(_mean(nats, targets)), num_target_tokens=targets
    )
