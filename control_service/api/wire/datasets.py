"""Datasets on the wire."""

from __future__ import annotations

from collections.abc import Iterable

from control_service.app.dataset_inspection import Rendering
from control_service.app.datasets import UploadHeader
from control_service.domain.dataset import (
    Dataset,
    DatasetRow,
    HistogramBucket,
    RenderedExample,
    Segment,
    TokenStatistics,
)
from control_service.domain.errors import invalid_field
from control_service.wire.values import timestamp
from tunesmith.common.v1 import dataset_pb2
from tunesmith.control.v1 import dataset_service_pb2


def upload_header(message: dataset_service_pb2.UploadDatasetHeader) -> UploadHeader:
    """What is being uploaded."""
    return UploadHeader(name=message.name, sha256=message.sha256, size_bytes=message.size_bytes, format=message.format)


def rendering_of(message: dataset_service_pb2.PreviewDatasetRequest) -> Rendering | None:
    """How rows are to be rendered; None without a base model. InvalidArgument for a choice that then means nothing."""
    if not message.base_model:
        for name in ("chat_template", "loss_on", "max_length"):
            if getattr(message, name):
                raise invalid_field(name, "says how rows are rendered, which needs base_model")
        return None
    return Rendering(
        base_model=message.base_model,
        chat_template=message.chat_template,
        loss_on=message.loss_on,
        max_length=message.max_length,
    )


def dataset_message(dataset: Dataset, tokens: TokenStatistics | None = None) -> dataset_service_pb2.Dataset:
    """A dataset's record; statistics stay unset for one of which nothing was counted."""
    message = dataset_service_pb2.Dataset(
        dataset_id=dataset.dataset_id,
        name=dataset.name,
        sha256=dataset.sha256,
        size_bytes=dataset.size_bytes,
        num_examples=dataset.num_examples,
        format=dataset.format,
        create_time=timestamp(dataset.create_time),
        file_format=dataset.file_format,
        compression=dataset.compression,
        file_sha256=dataset.file_sha256,
        file_size_bytes=dataset.file_size_bytes,
    )
    if dataset.statistics is not None:
        message.statistics.CopyFrom(
            dataset_service_pb2.DatasetStatistics(
                num_duplicates=dataset.statistics.num_duplicates,
                characters=_buckets(dataset.statistics.characters),
                total_characters=dataset.statistics.total_characters,
            )
        )
    if tokens is not None:
        message.statistics.tokens.CopyFrom(_tokens_message(tokens))
    return message


def row_message(row: DatasetRow) -> dataset_service_pb2.DatasetRow:
    """A row as it is stored, and as it was rendered."""
    rendered = None if row.rendered is None else _rendered_message(row.rendered)
    return dataset_service_pb2.DatasetRow(line=row.line, json=row.json, rendered=rendered)


def _rendered_message(rendered: RenderedExample) -> dataset_pb2.RenderedExample:
    return dataset_pb2.RenderedExample(
        segments=_segments(rendered.segments),
        rejected_segments=_segments(rendered.rejected_segments),
        num_tokens=rendered.num_tokens,
        num_target_tokens=rendered.num_target_tokens,
        truncated=rendered.truncated,
        dropped_reason=rendered.dropped_reason,
    )


def _segments(segments: Iterable[Segment]) -> list[dataset_pb2.Segment]:
    return [dataset_pb2.Segment(text=s.text, is_target=s.is_target, num_tokens=s.num_tokens) for s in segments]


def _tokens_message(tokens: TokenStatistics) -> dataset_pb2.TokenStatistics:
    return dataset_pb2.TokenStatistics(
        base_model=tokens.base_model,
        num_tokens=tokens.num_tokens,
        num_target_tokens=tokens.num_target_tokens,
        longest_tokens=tokens.longest_tokens,
        num_truncated=tokens.num_truncated,
        dropped=tokens.dropped,
        lengths=_buckets(tokens.lengths),
    )


def _buckets(buckets: Iterable[HistogramBucket]) -> list[dataset_pb2.HistogramBucket]:
    return [dataset_pb2.HistogramBucket(minimum=bucket.minimum, count=bucket.count) for bucket in buckets]
