"""What a person wants trained, and the rules it obeys before it is stored. Datasets are not looked up here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from control_service.domain.spec import Trait


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
