"""Sums of losses by trait and dataset, and the means that events tell.

Sums, not means: a mean is taken once, at the end, so that the parts weighted by their counts add up to the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_service.domain.planned_data import Source
from gpu_service.engine.training.batches import MicroBatch
from tunesmith.common.v1 import event_pb2


@dataclass(kw_only=True)
class _Sums:
    loss: float = 0.0
    # What the loss is divided by: target tokens, or pairs.
    weight: int = 0
    targets: int = 0
    pairs: int = 0
    # Pairs whose chosen answer has the higher reward.
    right: int = 0
    chosen_reward: float = 0.0
    rejected_reward: float = 0.0

    def add(self, other: _Sums) -> None:
        """Called for every example of every step, so it makes nothing new."""
        self.loss += other.loss
        self.weight += other.weight
        self.targets += other.targets
        self.pairs += other.pairs
        self.right += other.right
        self.chosen_reward += other.chosen_reward
        self.rejected_reward += other.rejected_reward

    @property
    def mean(self) -> float:
        return self.loss / self.weight if self.weight else math.nan


@dataclass(kw_only=True)
class LossTally:
    """What was measured so far, by (trait, dataset) in order of first appearance."""

    _sums: dict[tuple[str, int], _Sums] = field(default_factory=dict)

    def add(
        self,
        batch: MicroBatch,
        weights: Sequence[int],
        values: Sequence[Sequence[float]],
        sources: Sequence[Source],
    ) -> None:
        """Add one micro-batch: `weights` and `values` as the objective gave them, on the host."""
        for place, source_index in enumerate(batch.sources):
            loss, *rewards = values[place]
            entry = _Sums(loss=loss, weight=weights[place], targets=batch.targets_by_example[place])
            if rewards:
                chosen, rejected = rewards
                entry.pairs, entry.right = 1, int(chosen > rejected)
                entry.chosen_reward, entry.rejected_reward = chosen, rejected
            source = sources[source_index]
            self._sums.setdefault((source.trait_type, source.dataset_id), _Sums()).add(entry)

    @property
    def num_target_tokens(self) -> int:
        return self._whole().targets

    @property
    def mean(self) -> float:
        """Loss over everything; not a number when there is nothing."""
        return self._whole().mean

    def by_trait(self) -> list[event_pb2.LossValue]:
        """One value a trait. Weighted they add up to `mean`."""
        traits: dict[str, _Sums] = {}
        for (trait, _), sums in self._sums.items():
            traits.setdefault(trait, _Sums()).add(sums)
        return [_loss_value(trait, 0, sums) for trait, sums in traits.items()]

    def by_dataset(self) -> list[event_pb2.LossValue]:
        """One value a dataset of each trait. Weighted they add up to `mean`, and a trait's to the trait's."""
        return [_loss_value(trait, dataset, sums) for (trait, dataset), sums in self._sums.items()]

    def preference(self) -> event_pb2.PreferenceMetrics | None:
        """Rewards over everything; None when there was no pair."""
        whole = self._whole()
        if not whole.pairs:
            return None
        return event_pb2.PreferenceMetrics(
            num_pairs=whole.pairs,
            reward_accuracy=whole.right / whole.pairs,
            chosen_reward=whole.chosen_reward / whole.pairs,
            rejected_reward=whole.rejected_reward / whole.pairs,
        )

    def _whole(self) -> _Sums:
        whole = _Sums()
        for sums in self._sums.values():
            whole.add(sums)
        return whole


def finite(value: float) -> float | None:
    """`value`, or None when it is not a finite number: unset on the wire."""
    return value if math.isfinite(value) else None


def as_json(values: Iterable[event_pb2.LossValue]) -> list[Mapping[str, Any]]:
    """Loss values for the report."""
    return [
        {
            "trait_type": value.trait_type,
            "dataset_id": value.dataset_id,
            "loss": value.loss if value.HasField("loss") else None,
            "num_target_tokens": value.num_target_tokens,
            "num_pairs": value.num_pairs,
        }
        for value in values
    ]


def preference_as_json(metrics: event_pb2.PreferenceMetrics | None) -> Mapping[str, Any] | None:
    """Preference metrics for the report; null where a value is not finite."""
    if metrics is None:
        return None
    return {
        "num_pairs": metrics.num_pairs,
        "reward_accuracy": metrics.reward_accuracy,
        "chosen_reward": finite(metrics.chosen_reward),
        "rejected_reward": finite(metrics.rejected_reward),
    }


def _loss_value(trait: str, dataset: int, sums: _Sums) -> event_pb2.LossValue:
    return event_pb2.LossValue(
        trait_type=trait,
        dataset_id=dataset,
        loss=finite(sums.mean),
        num_target_tokens=sums.targets,
        num_pairs=sums.pairs,
    )
