"""Datasets on the wire."""

from __future__ import annotations

from control_service.app.datasets import UploadHeader
from control_service.domain.dataset import Dataset, DatasetRow
from control_service.wire.values import timestamp
from tunesmith.control.v1 import dataset_service_pb2


def upload_header(message: dataset_service_pb2.UploadDatasetHeader) -> UploadHeader:
    """What is being uploaded."""
    return UploadHeader(name=message.name, sha256=message.sha256, size_bytes=message.size_bytes, format=message.format)


def dataset_message(dataset: Dataset) -> dataset_service_pb2.Dataset:
    """A dataset's record."""
    return dataset_service_pb2.Dataset(
        dataset_id=dataset.dataset_id,
        name=dataset.name,
        sha256=dataset.sha256,
        size_bytes=dataset.size_bytes,
        num_examples=dataset.num_examples,
        format=dataset.format,
        create_time=timestamp(dataset.create_time),
    )


def row_message(row: DatasetRow) -> dataset_service_pb2.DatasetRow:
    """A row as it is in the file."""
    return dataset_service_pb2.DatasetRow(line=row.line, json=row.json)
