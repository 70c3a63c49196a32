"""What a fake node says of a dataset's rows: every word is a token, and all but a row's first carry loss."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.common.v1 import dataset_pb2
from tunesmith.gpu.v1 import run_service_pb2


def inspect_rows(
    content: bytes, request: run_service_pb2.InspectDatasetRequest
) -> run_service_pb2.InspectDatasetResponse:
    """Rows rendered and tokens counted, as far as they were asked for."""
    examples = [render_words(json.loads(line)) for line in content.splitlines() if line.strip()]
    tokens = dataset_pb2.TokenStatistics(
        base_model=request.base_model,
        num_tokens=sum(example.num_tokens for example in examples),
        num_target_tokens=sum(example.num_target_tokens for example in examples),
        longest_tokens=max(example.num_tokens for example in examples),
        lengths=[dataset_pb2.HistogramBucket(minimum=1, count=len(examples))],
    )
    return run_service_pb2.InspectDatasetResponse(
        rows=examples[: request.num_rows], tokens=tokens if request.count_tokens else None
    )


def render_words(row: dict[str, Any]) -> dataset_pb2.RenderedExample:
    """A row's texts, word by word."""
    words = " ".join(value for value in row.values() if isinstance(value, str)).split()
    prompt, answer = words[:1], words[1:]
    return dataset_pb2.RenderedExample(
        segments=[
            dataset_pb2.Segment(text=" ".join(part), is_target=is_target, num_tokens=len(part))
            for part, is_target in ((prompt, False), (answer, True))
            if part
        ],
        num_tokens=len(words),
        num_target_tokens=len(answer),
        dropped_reason="" if answer else "no_target_tokens",
    )
