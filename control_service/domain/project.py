"""What a person wants trained, and the rules it obeys before it is stored. Datasets are not looked up here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeVar

from control_service.domain import mix
from control_service.domain.errors import FieldViolation, InvalidArgument
from control_service.domain.output_path import normalize_output_directory, problem_with_output_directory
from control_service.domain.spec import DatasetReference, TrainingSpec, Trait

T = TypeVar("T", bound=Hashable)

# Spellings of a training type that are accepted on input, and what they mean.
TRAINING_TYPE_ALIASES: Mapping[str, str] = {"standard": "full"}


@dataclass(frozen=True, kw_only=True)
class ProjectDraft:
    """The fields of a project that a person writes.

    `mix`, `hyperparameters` and `sample_prompts` are opaque proto JSON with proto field names; int64 values are
    strings.
    """

    name: str
    base_model: str
    model_type: str
    training_type: str
    output_directory: str
    traits: tuple[Trait, ...]
    mix: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    sample_prompts: Sequence[Mapping[str, Any]] = ()


# Fields that UpdateProject can replace.
WRITABLE_FIELDS: tuple[str, ...] = tuple(ProjectDraft.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Project:
    """A stored project. `project_id` counts from 1; `etag` changes with every update."""

    project_id: int
    draft: ProjectDraft
    create_time: datetime
    update_time: datetime
    etag: str

    def spec(self, datasets: Sequence[DatasetReference]) -> TrainingSpec:
        """The snapshot a job trains by; `datasets` are those that `dataset_ids` names."""
        return TrainingSpec(
            base_model=self.draft.base_model,
            model_type=self.draft.model_type,
            training_type=self.draft.training_type,
            traits=self.draft.traits,
            datasets=tuple(sorted(datasets, key=lambda reference: reference.dataset_id)),
            mix=self.draft.mix,
            hyperparameters=self.draft.hyperparameters,
            sample_prompts=self.draft.sample_prompts,
        )


def dataset_ids(traits: Sequence[Trait]) -> tuple[int, ...]:
    """Every dataset that the traits name, once, ascending."""
    trained = {part.dataset_id for trait in traits for part in trait.datasets}
    held_out = {dataset_id for trait in traits for dataset_id in trait.held_out_dataset_ids}
    return tuple(sorted(trained | held_out))


def checked(draft: ProjectDraft) -> ProjectDraft:
    """The draft in its normal form, or InvalidArgument with a violation for every field that breaks a rule.

    The reason is that of the first violation: PERCENTAGES_NOT_100, WEIGHTS_ALL_ZERO, PATH_NOT_ALLOWED or INVALID_FIELD.
    """
    problems = list(_problems(draft))
    if problems:
        reason, first = problems[0]
        raise InvalidArgument(
            reason,
            f"{first.field}: {first.description}",
            violations=tuple(violation for _, violation in problems),
        )
    return replace(
        draft,
        training_type=TRAINING_TYPE_ALIASES.get(draft.training_type, draft.training_type),
        output_directory=normalize_output_directory(draft.output_directory),
    )


def _problems(draft: ProjectDraft) -> Iterator[tuple[str, FieldViolation]]:
    for name in ("name", "base_model", "model_type", "training_type"):
        if not getattr(draft, name).strip():
            yield "INVALID_FIELD", FieldViolation(f"project.{name}", "must not be empty")
    if problem := problem_with_output_directory(draft.output_directory):
        yield "PATH_NOT_ALLOWED", FieldViolation("project.output_directory", problem)
    if not draft.traits:
        yield "INVALID_FIELD", FieldViolation("project.traits", "must name at least one trait")
    for index, trait in enumerate(draft.traits):
        yield from _trait_problems(f"project.traits[{index}]", trait)
    for trait_type, count in _repeated([trait.trait_type for trait in draft.traits]):
        yield "INVALID_FIELD", FieldViolation("project.traits", f"{trait_type!r} is named {count} times")
    if mix.all_weights_are_zero(draft.traits):
        yield "WEIGHTS_ALL_ZERO", FieldViolation("project.traits", "at least one weight must be larger than 0")
    yield from _held_out_problems(draft.traits)


def _trait_problems(path: str, trait: Trait) -> Iterator[tuple[str, FieldViolation]]:
    if not trait.trait_type.strip():
        yield "INVALID_FIELD", FieldViolation(f"{path}.trait_type", "must not be empty")
    if trait.weight is not None and not (math.isfinite(trait.weight) and trait.weight >= 0):
        yield "INVALID_FIELD", FieldViolation(f"{path}.weight", "must be a finite number of at least 0")
    if problem := mix.problem_with_held_out_fraction(trait):
        yield "INVALID_FIELD", FieldViolation(f"{path}.held_out_fraction", problem)
    if not trait.datasets:
        yield "INVALID_FIELD", FieldViolation(f"{path}.datasets", "must name at least one dataset")
        return
    numbers_are_good = True
    for index, part in enumerate(trait.datasets):
        if not (math.isfinite(part.percentage) and 0 <= part.percentage <= 100):
            numbers_are_good = False
            yield (
                "INVALID_FIELD",
                FieldViolation(f"{path}.datasets[{index}].percentage", "must be a finite number from 0 to 100"),
            )
    for dataset_id, count in _repeated([part.dataset_id for part in trait.datasets]):
        yield "INVALID_FIELD", FieldViolation(f"{path}.datasets", f"dataset {dataset_id} is named {count} times")
    if numbers_are_good and (problem := mix.problem_with_percentages(trait)):
        yield "PERCENTAGES_NOT_100", FieldViolation(f"{path}.datasets", problem)


def _repeated(names: Sequence[T]) -> list[tuple[T, int]]:
    """Those that are there more than once, and how often."""
    if len(set(names)) == len(names):
        return []
    return [(name, count) for name, count in Counter(names).items() if count > 1]


def _held_out_problems(traits: Sequence[Trait]) -> Iterator[tuple[str, FieldViolation]]:
    trained = {part.dataset_id for trait in traits for part in trait.datasets}
    for index, trait in enumerate(traits):
        for dataset_id in sorted(trained.intersection(trait.held_out_dataset_ids)):
            yield (
                "INVALID_FIELD",
                FieldViolation(
                    f"project.traits[{index}].held_out_dataset_ids",
                    f"dataset {dataset_id} is also trained on; a held-out dataset never is",
                ),
            )
