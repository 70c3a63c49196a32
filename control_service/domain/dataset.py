"""A dataset's record. Its rows are read in `dataset_rows`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from control_service.domain.spec import DatasetReference


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An immutable, content-addressed set of examples. `dataset_id` counts from 1."""

    dataset_id: int
    name: str
    sha256: str
    size_bytes: int
    num_examples: int
    format: str
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
class DatasetRow:
    """A row as it is in the file. `line` counts from 1."""

    line: int
    json: str
