"""The immutable snapshot that a job trains by, and its digest. Reads no dataset and applies no default."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TraitDataset:
    """One dataset's part of a trait, in percent."""

    dataset_id: int
    percentage: float


@dataclass(frozen=True, kw_only=True)
class Trait:
    """One thing the model should learn. `weight` None: unset, which counts as 1."""

    trait_type: str
    datasets: tuple[TraitDataset, ...]
    weight: float | None = None
    held_out_dataset_ids: tuple[int, ...] = ()
    held_out_fraction: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The trait as proto JSON with proto field names."""
        value: dict[str, Any] = {
            "trait_type": self.trait_type,
            "datasets": [{"dataset_id": d.dataset_id, "percentage": float(d.percentage)} for d in self.datasets],
        }
        if self.weight is not None:
            value["weight"] = float(self.weight)
        if self.held_out_dataset_ids:
            value["held_out_dataset_ids"] = list(self.held_out_dataset_ids)
        if self.held_out_fraction is not None:
            value["held_out_fraction"] = float(self.held_out_fraction)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Trait:
        """Reads proto JSON with proto field names."""
        datasets = tuple(
            TraitDataset(dataset_id=int(d.get("dataset_id", 0)), percentage=float(d.get("percentage", 0.0)))
            for d in value.get("datasets", ())
        )
        weight, fraction = value.get("weight"), value.get("held_out_fraction")
        return cls(
            trait_type=value.get("trait_type", ""),
            datasets=datasets,
            weight=None if weight is None else float(weight),
            held_out_dataset_ids=tuple(int(i) for i in value.get("held_out_dataset_ids", ())),
            held_out_fraction=None if fraction is None else float(fraction),
        )


@dataclass(frozen=True, kw_only=True)
class DatasetReference:
    """A dataset as a node needs it: content, not a name."""

    dataset_id: int
    sha256: str
    size_bytes: int
    format: str
    num_examples: int

    def to_json(self) -> dict[str, Any]:
        """The reference as proto JSON with proto field names: int64 values are strings."""
        return {
            "dataset_id": self.dataset_id,
            "sha256": self.sha256,
            "size_bytes": str(self.size_bytes),
            "format": self.format,
            "num_examples": str(self.num_examples),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DatasetReference:
        """Reads what `to_json` wrote."""
        return cls(
            dataset_id=int(value["dataset_id"]),
            sha256=value["sha256"],
            size_bytes=int(value["size_bytes"]),
            format=value["format"],
            num_examples=int(value["num_examples"]),
        )


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What a job trains; `task` empty is training.

    `mix`, `hyperparameters`, `sample_prompts` and `start_from` are opaque proto JSON with proto field names.
    """

    base_model: str
    model_type: str
    training_type: str
    traits: tuple[Trait, ...]
    datasets: tuple[DatasetReference, ...]
    mix: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    sample_prompts: Sequence[Mapping[str, Any]] = ()
    start_from: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""

    def to_json(self) -> dict[str, Any]:
        """The spec as `TrainingSpec` proto JSON with proto field names; unset parts are left out."""
        value: dict[str, Any] = {
            "base_model": self.base_model,
            "model_type": self.model_type,
            "training_type": self.training_type,
            "traits": [trait.to_json() for trait in self.traits],
            "datasets": [reference.to_json() for reference in self.datasets],
        }
        if self.mix:
            value["mix"] = dict(self.mix)
        if self.hyperparameters:
            value["hyperparameters"] = dict(self.hyperparameters)
        if self.sample_prompts:
            value["sample_prompts"] = [dict(prompt) for prompt in self.sample_prompts]
        if self.start_from:
            value["start_from"] = dict(self.start_from)
        if self.task:
            value["task"] = self.task
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingSpec:
        """Reads what `to_json` wrote."""
        return cls(
            base_model=value["base_model"],
            model_type=value["model_type"],
            training_type=value["training_type"],
            traits=tuple(Trait.from_json(trait) for trait in value["traits"]),
            datasets=tuple(DatasetReference.from_json(reference) for reference in value["datasets"]),
            mix=value.get("mix", {}),
            hyperparameters=value.get("hyperparameters", {}),
            sample_prompts=tuple(value.get("sample_prompts", ())),
            start_from=value.get("start_from", {}),
            task=value.get("task", ""),
        )

    def digest(self) -> str:
        """Lower-case hex SHA-256 over the canonical JSON of the spec."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, no non-finite number."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
