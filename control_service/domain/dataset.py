"""A dataset's record, and what a node says of its rows. Rows themselves are read in `dataset_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from control_service.domain.spec import DatasetReference


@dataclass(frozen=True, kw_only=True)
class HistogramBucket:
    """One bar: from `minimum` up to, but not with, the next bucket's."""

    minimum: int
    count: int


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """What registration counted: rows equal to an earlier one, and characters of text in a row over all its fields."""

    num_duplicates: int = 0
    total_characters: int = 0
    characters: tuple[HistogramBucket, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return {
            "num_duplicates": self.num_duplicates,
            "total_characters": self.total_characters,
            "characters": [[bucket.minimum, bucket.count] for bucket in self.characters],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DatasetStatistics:
        """From what was stored."""
        buckets = tuple(HistogramBucket(minimum=minimum, count=count) for minimum, count in value["characters"])
        return cls(
            num_duplicates=value["num_duplicates"], total_characters=value["total_characters"], characters=buckets
        )


@dataclass(frozen=True, kw_only=True)
class DatasetDraft:
    """What registration found: a dataset but for its id, name and time.

    `sha256`, `size_bytes`: the rows as JSON lines, which is what nodes are given. `file_sha256`, `file_size_bytes`,
    `file_format`, `compression` (empty: none): what came in. `statistics` None: registered before there were any.
    """

    sha256: str
    size_bytes: int
    num_examples: int
    format: str
    file_format: str
    compression: str
    file_sha256: str
    file_size_bytes: int
    statistics: DatasetStatistics | None


@dataclass(frozen=True, kw_only=True)
class Dataset(DatasetDraft):
    """An immutable, content-addressed set of examples. `dataset_id` counts from 1."""

    dataset_id: int
    name: str
    create_time: datetime

    def reference(self) -> DatasetReference:
        """The dataset as a node needs it."""
        return DatasetReference(
            dataset_id=self.dataset_id,
            sha256=self.sha256,
            size_bytes=self.size_bytes,
            format=self.format,
            num_examples=self.num_examples,
        )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive tokens that are alike in whether they carry loss."""

    text: str
    is_target: bool
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class RenderedExample:
    """A row as a model will see it. `rejected_segments`: of a preference pair. `dropped_reason` empty: it is kept."""

    segments: tuple[Segment, ...]
    rejected_segments: tuple[Segment, ...] = ()
    num_tokens: int
    num_target_tokens: int
    truncated: bool = False
    dropped_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Tokens of a dataset by one base's tokenizer, after truncation. `dropped`: reason -> examples."""

    base_model: str
    num_tokens: int
    num_target_tokens: int
    longest_tokens: int
    num_truncated: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    lengths: tuple[HistogramBucket, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetInspection:
    """What a node found: the first rows rendered, and tokens where they were asked for."""

    rows: tuple[RenderedExample, ...]
    tokens: TokenStatistics | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """A row as it is stored; `rendered` when a base model was named. `line` counts from 1."""

    line: int
    json: str
    rendered: RenderedExample | None = None
