"""InspectDataset through a real server: rows as a base sees them, tokens counted, refusals typed, one at a time."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from tests.fakes.datasets import write_blob
from tests.fakes.gpu_runs import WAIT_SECONDS, wait_for
from tests.fakes.gpu_server import INSTALLATION, GpuServer, error_info
from tests.fakes.tiny_models import TinyOptions, place_header_only
from tunesmith.common.v1 import plan_pb2
from tunesmith.gpu.v1 import run_service_pb2

CHAT = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}


def ask(server: GpuServer, dataset: dict[str, Any], **fields: Any) -> run_service_pb2.InspectDatasetRequest:
    request = run_service_pb2.InspectDatasetRequest(
        **{"installation_id": INSTALLATION, "base_model": "org/name", "num_rows": 2, **fields}
    )
    json_format.ParseDict(dataset, request.dataset)
    return request


def write(server: GpuServer, rows: Any, format: str) -> dict[str, Any]:
    return write_blob(server.data_directory / "blobs", 3, rows, format)


def test_rows_and_tokens(server: GpuServer) -> None:
    dataset = write(server, [CHAT] * 40, "chat-messages")
    found = server.runs.InspectDataset(ask(server, dataset, count_tokens=True), timeout=WAIT_SECONDS)
    assert len(found.rows) == 2
    segments = [(segment.text, segment.is_target) for segment in found.rows[0].segments]
    prompt = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert segments == [(prompt, False), ("Hello.<|im_end|>\n", True)]
    assert found.tokens.num_tokens == 40 * found.rows[0].num_tokens
    assert found.tokens.num_target_tokens == 40 * found.rows[0].num_target_tokens
    assert [bucket.count for bucket in found.tokens.lengths] == [40]
    shown = server.runs.InspectDataset(ask(server, dataset), timeout=WAIT_SECONDS)
    assert list(shown.rows) == list(found.rows)
    assert not shown.HasField("tokens")
    assert list((server.data_directory / "requests").iterdir()) == []


def test_refusals(server: GpuServer) -> None:
    place_header_only(server.models_directory, TinyOptions(chat_template=False), name="org/base")
    dataset = write(server, [CHAT], "chat-messages")
    broken = write(server, b'{"text": "a"}\n{"txt": "b"}\n', "text")
    gone = {**dataset, "sha256": hashlib.sha256(b"gone").hexdigest()}
    precondition, argument = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT
    cases: list[tuple[dict[str, Any], dict[str, Any], grpc.StatusCode, str]] = [
        (gone, {}, precondition, "BLOB_NOT_FOUND"),
        (dataset, {"base_model": "org/other"}, precondition, "MODEL_NOT_FOUND"),
        (dataset, {"base_model": "org/base"}, precondition, "CHAT_TEMPLATE_MISSING"),
        (broken, {}, argument, "DATASET_MALFORMED"),
        ({**dataset, "format": "csv"}, {}, argument, "DATASET_FORMAT_UNKNOWN"),
        ({**dataset, "sha256": "../x"}, {}, argument, "INVALID_FIELD"),
        (dataset, {"num_rows": -1}, argument, "INVALID_FIELD"),
        (dataset, {"num_rows": 101}, argument, "INVALID_FIELD"),
        (dataset, {"max_length": 4}, argument, "INVALID_FIELD"),
    ]
    for reference, fields, code, reason in cases:
        with pytest.raises(grpc.RpcError) as refused:
            server.runs.InspectDataset(ask(server, reference, **fields), timeout=WAIT_SECONDS)
        assert error_info(refused.value)[:2] == (code, reason), (fields, refused.value)
        if reason == "DATASET_MALFORMED":
            assert error_info(refused.value)[2]["line"] == "2"


def test_a_look_at_rows_does_not_wait_for_long_work(server: GpuServer) -> None:
    dataset = write(server, [CHAT] * 200_000, "chat-messages")
    counting = server.runs.InspectDataset.future(ask(server, dataset, count_tokens=True), timeout=WAIT_SECONDS)
    wait_for(lambda: list((server.data_directory / "requests").iterdir()), what="the long one")
    assert len(server.runs.InspectDataset(ask(server, dataset), timeout=WAIT_SECONDS).rows) == 2
    assert not counting.done()
    counting.cancel()
    wait_for(lambda: not list((server.data_directory / "requests").iterdir()), what="the long one's end")


def test_it_takes_turns_with_plans(server: GpuServer) -> None:
    dataset = write(server, [CHAT] * 300, "chat-messages")
    plan = run_service_pb2.PlanRunRequest(spec=server.request().spec, level=plan_pb2.PLAN_LEVEL_EXACT)
    counting = server.runs.InspectDataset.future(ask(server, dataset, count_tokens=True), timeout=WAIT_SECONDS)
    planning = server.runs.PlanRun.future(plan, timeout=WAIT_SECONDS)
    showing = server.runs.InspectDataset.future(ask(server, dataset), timeout=WAIT_SECONDS)
    assert counting.result().tokens.num_tokens == 300 * showing.result().rows[0].num_tokens
    assert planning.result().plan.num_steps


def test_capabilities_name_every_format_and_optimizer(server: GpuServer) -> None:
    found = server.runs.GetCapabilities(run_service_pb2.GetCapabilitiesRequest(), timeout=WAIT_SECONDS)
    formats = {entry.id: entry.details for entry in found.dataset_formats}
    assert list(formats) == ["chat-messages", "sharegpt", "prompt-completion", "instruction", "text", "preference"]
    assert {name for name, details in formats.items() if details["is_preference"] == "true"} == {"preference"}
    assert "adamw" in [entry.id for entry in found.optimizers]
