"""Datasets over a real server: files of every kind come in, nodes render and count, and nothing half-written stays."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import grpc
import pytest

from tests.fakes.control import ROWS, Client, control, error_info, reason_of, violated_fields
from tests.fakes.dataset_files import as_csv, as_json, as_parquet, zstd
from tests.fakes.gpu_node import MODEL, FakeGpuNode
from tests.fakes.gpu_refusal import Refusal
from tunesmith.control.v1 import dataset_service_pb2

PAIRS = [json.loads(line) for line in ROWS.splitlines()]
CANONICAL = b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in PAIRS)


def _files(directory: Path) -> set[str]:
    """Names of every blob, whole or staged."""
    return {path.name for path in (directory / "control" / "blobs").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("content", "file_format", "compression"),
    [
        (as_csv(PAIRS), "csv", ""),
        (zstd(as_json(PAIRS)), "json", "zstd"),
        (gzip.compress(as_parquet(PAIRS), mtime=0), "parquet", "gzip"),
        (gzip.compress(ROWS, mtime=0), "jsonl", "gzip"),
    ],
)
async def test_every_file_is_kept_as_json_lines_and_known_again(
    client: Client, tmp_path: Path, content: bytes, file_format: str, compression: str
) -> None:
    dataset = await client.upload("rows", content)
    assert (dataset.file_format, dataset.compression) == (file_format, compression)
    assert (dataset.file_sha256, dataset.file_size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (dataset.sha256, dataset.size_bytes) == (hashlib.sha256(CANONICAL).hexdigest(), len(CANONICAL))
    assert (dataset.format, dataset.num_examples) == ("prompt-completion", 8)
    assert dataset.statistics.total_characters == 8 * 4
    assert [(bucket.minimum, bucket.count) for bucket in dataset.statistics.characters] == [(4, 8)]
    assert not dataset.statistics.HasField("tokens")
    # The upload itself is gone, and the rows are there once.
    assert _files(tmp_path) == {dataset.sha256}
    assert await client.upload("rows", content) == dataset
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.upload("rows", ROWS)
    assert reason_of(caught.value) == "DATASET_NAME_TAKEN"
    read = await client.datasets.GetDataset(dataset_service_pb2.GetDatasetRequest(dataset_id=dataset.dataset_id))
    assert read.dataset == dataset


async def test_json_lines_are_kept_as_their_own_bytes(client: Client, tmp_path: Path) -> None:
    content = b'\n{"text":   "a"}\r\n{"text": "a"}'
    dataset = await client.upload("rows", content)
    assert dataset.sha256 == dataset.file_sha256 == hashlib.sha256(content).hexdigest()
    assert (dataset.statistics.num_duplicates, dataset.file_format) == (1, "jsonl")
    assert _files(tmp_path) == {dataset.sha256}


async def test_a_bad_table_names_format_line_and_column_and_leaves_nothing(client: Client, tmp_path: Path) -> None:
    content = b"prompt,completion\n" + b"a,b\n" * 500 + b"a,\n" + b"c\n"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.upload("bad", content)
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_MALFORMED")
    info = error_info(caught.value).metadata
    assert (info["file_format"], info["line"], info["column"]) == ("csv", "502", "completion")
    assert violated_fields(caught.value) == ["line 502, column completion", "line 503"]
    assert _files(tmp_path) == set()


async def test_a_file_that_becomes_too_large_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    content = gzip.compress(b"text\n" + b"a" * 10_000 + b"\n")
    async with control(tmp_path / "control", max_dataset_bytes=5000) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.upload("bad", content)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(caught.value) == "TOO_LARGE"
        assert _files(tmp_path) == set()


async def test_a_node_counts_tokens_and_renders_rows_that_it_is_given_first(client: Client, node: FakeGpuNode) -> None:
    dataset = await client.upload("rows", as_csv(PAIRS))
    counted = await client.datasets.GetDataset(
        dataset_service_pb2.GetDatasetRequest(dataset_id=dataset.dataset_id, base_model=MODEL), timeout=60
    )
    assert node.blobs[dataset.sha256] == CANONICAL
    tokens = counted.dataset.statistics.tokens
    assert (tokens.base_model, tokens.num_tokens, tokens.num_target_tokens, tokens.longest_tokens) == (MODEL, 16, 8, 2)
    assert [(bucket.minimum, bucket.count) for bucket in tokens.lengths] == [(1, 8)]
    assert counted.dataset.statistics.characters == dataset.statistics.characters
    preview = await client.datasets.PreviewDataset(
        dataset_service_pb2.PreviewDatasetRequest(
            dataset_id=dataset.dataset_id,
            num_rows=2,
            base_model=MODEL,
            chat_template="chatml",
            loss_on="all",
            max_length=99,
        ),
        timeout=60,
    )
    assert [[(part.text, part.is_target) for part in row.rendered.segments] for row in preview.rows] == [
        [("q0", False), ("a0", True)],
        [("q1", False), ("a1", True)],
    ]
    asked = node.inspected[-1]
    assert (asked.chat_template, asked.loss_on, asked.max_length, asked.num_rows) == ("chatml", "all", 99, 2)
    assert (asked.count_tokens, asked.dataset.format, asked.installation_id != "") == (False, "prompt-completion", True)
    plain = await client.datasets.PreviewDataset(
        dataset_service_pb2.PreviewDatasetRequest(dataset_id=dataset.dataset_id, num_rows=1)
    )
    assert not plain.rows[0].HasField("rendered")


async def test_what_a_node_refuses_a_preview_with_reaches_the_caller(client: Client, node: FakeGpuNode) -> None:
    dataset = await client.upload("rows")
    preview = dataset_service_pb2.PreviewDatasetRequest(dataset_id=dataset.dataset_id, base_model=MODEL)
    node.inspect_refusal = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "CHAT_TEMPLATE_MISSING", "it has none")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.datasets.PreviewDataset(preview, timeout=60)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(caught.value) == "CHAT_TEMPLATE_MISSING"
    node.inspect_refusal, node.hold_plans = None, True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.datasets.PreviewDataset(preview, timeout=1.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    node.hold_plans = False
    preview.base_model = "org/none"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.datasets.PreviewDataset(preview, timeout=60)
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_FOUND")
    assert error_info(caught.value).metadata["available_models"] == MODEL
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.datasets.PreviewDataset(
            dataset_service_pb2.PreviewDatasetRequest(dataset_id=dataset.dataset_id, loss_on="all")
        )
    assert violated_fields(caught.value) == ["loss_on"]


async def test_a_preview_has_as_many_rows_as_a_node_can_show(
    client: Client, node: FakeGpuNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = await client.upload("rows")
    preview = dataset_service_pb2.PreviewDatasetRequest(dataset_id=dataset.dataset_id, base_model=MODEL, num_rows=4)
    node.most_rows_shown = 2
    shown = await client.datasets.PreviewDataset(preview, timeout=60)
    assert [row.line for row in shown.rows] == [1, 2]
    assert all(row.rendered.num_tokens for row in shown.rows)
    node.most_rows_shown = 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.datasets.PreviewDataset(preview, timeout=60)
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE")
    assert "line 1" in str(caught.value.details())


async def test_without_a_node_nothing_is_counted(tmp_path: Path) -> None:
    async with control(tmp_path / "control") as client:
        dataset = await client.upload("rows")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.datasets.GetDataset(
                dataset_service_pb2.GetDatasetRequest(dataset_id=dataset.dataset_id, base_model=MODEL)
            )
        assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_NODE")
