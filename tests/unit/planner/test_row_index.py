"""The index of a dataset is made of bytes that have the dataset's hash, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpu_service.domain.errors import Refusal
from gpu_service.domain.spec import DatasetReference
from gpu_service.planner.row_index import open_index
from tests.fakes.datasets import write_blob


def test_a_damaged_blob_has_no_index(tmp_path: Path) -> None:
    written = write_blob(tmp_path / "blobs", 1, [{"text": "one"}, {"text": "two"}], "text")
    reference = replace(DatasetReference(dataset_id=1, sha256=written["sha256"], num_examples=2), format="text")
    blob = tmp_path / "blobs" / reference.sha256[:2] / reference.sha256
    good = blob.read_bytes()
    blob.write_bytes(good.replace(b"two", b"six"))
    for _ in range(2):
        with pytest.raises(Refusal, match="CHECKSUM_MISMATCH"):
            open_index(reference, blobs_directory=tmp_path / "blobs", rows_directory=tmp_path / "rows")
    blob.write_bytes(good)
    index = open_index(reference, blobs_directory=tmp_path / "blobs", rows_directory=tmp_path / "rows")
    assert [index.read(row) for row in range(index.num_rows)] == [{"text": "one"}, {"text": "two"}]
