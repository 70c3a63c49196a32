"""The node's Generate with real server and shims, over an engine that says what the test scripts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from tests.fakes.gpu_runs import WAIT_SECONDS, wait_for
from tests.fakes.gpu_server import GpuServer, error_info
from tunesmith.common.v1 import event_pb2, file_pb2, generation_pb2, training_spec_pb2
from tunesmith.gpu.v1 import inference_service_pb2

ENDLESS = json.dumps({"endless": True})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuServer]:
    made = GpuServer(tmp_path_factory.mktemp("node"))
    try:
        yield made.start()
    finally:
        made.clean_up()


def request(content: str, **fields: Any) -> inference_service_pb2.GenerateRequest:
    return inference_service_pb2.GenerateRequest(
        base_model="org/name", messages=[generation_pb2.ChatMessage(role="user", content=content)], **fields
    )


def ask(server: GpuServer, content: str, **fields: Any) -> Any:
    return server.inference.Generate(request(content, **fields), timeout=WAIT_SECONDS)


def text_of(call: Any) -> str:
    return "".join(response.part.text for response in call)


def refused(call: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return error_info(caught.value)


def requests_left(server: GpuServer) -> list[Path]:
    return list((server.data_directory / "requests").iterdir())


def test_an_answer_is_streamed_with_its_statistics(server: GpuServer) -> None:
    parts = [response.part for response in ask(server, "one two three")]
    assert "".join(part.text for part in parts) == "one two three "
    assert [part.finish_reason for part in parts] == [0] * (len(parts) - 1) + [generation_pb2.FINISH_REASON_STOP]
    assert sum(part.num_tokens for part in parts) == parts[-1].statistics.num_tokens == 3
    # The engine stays for the next, with its base, and nothing else stays.
    (shim,) = server.shims()
    assert text_of(ask(server, "again")) == "again "
    assert [other["shim_pid"] for other in server.shims()] == [shim["shim_pid"]]
    wait_for(lambda: not requests_left(server), what="the requests to be gone")


def test_an_adapter_is_given_to_the_engine_from_blobs(server: GpuServer) -> None:
    contents = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "README.md": b"for people"}
    files = [
        file_pb2.FileReference(path=path, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
        for path, content in contents.items()
    ]
    script = json.dumps({"adapter_files": True})
    code, reason, details = refused(ask(server, script, adapter_files=files))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BLOB_NOT_FOUND")
    assert set(details["sha256"].split(",")) == {file.sha256 for file in files[:2]}
    for content in contents.values():
        server.write_blob(content)
    assert text_of(ask(server, script, adapter_files=files)) == "adapter_config.jsonadapter_model.safetensors"
    # Of a checkpoint, the weights.
    weights = file_pb2.FileReference(path="weights.safetensors", sha256=files[1].sha256, size_bytes=7)
    others = file_pb2.FileReference(path="optimizer.safetensors", sha256="0" * 64, size_bytes=7)
    assert text_of(ask(server, script, adapter_files=[weights, others])) == "weights.safetensors"
    code, reason, _ = refused(ask(server, script, adapter_files=files[:1]))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"base_model": "org/other"}, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        ({"weights_digest": "0" * 64}, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        ({"messages": []}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"chat_template": "none-such"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"sampling": generation_pb2.Sampling(top_p=0)}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"sampling": generation_pb2.Sampling(stop=[""])}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"lora": training_spec_pb2.Lora(rank=0)}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"model_type": "gemma3"}, grpc.StatusCode.INVALID_ARGUMENT, "MODEL_TYPE_MISMATCH"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    server: GpuServer, fields: dict[str, Any], code: grpc.StatusCode, reason: str
) -> None:
    asked = request("hello")
    asked.MergeFrom(
        inference_service_pb2.GenerateRequest(**{name: value for name, value in fields.items() if name != "messages"})
    )
    if "messages" in fields:
        del asked.messages[:]
    assert refused(server.inference.Generate(asked, timeout=WAIT_SECONDS))[:2] == (code, reason)


def test_a_caller_that_goes_away_ends_the_generation(server: GpuServer) -> None:
    call = ask(server, ENDLESS)
    assert next(call).part.text
    # One at a time: the second waits for the first, and goes on at once when that is cancelled.
    following = ask(server, "second")
    call.cancel()
    assert text_of(following) == "second "
    wait_for(lambda: not requests_left(server), what="the requests to be gone")


def test_a_reader_that_does_not_read_holds_up_nobody_and_misses_nothing(server: GpuServer) -> None:
    call = ask(server, json.dumps({"words": [f"{number:02000}" for number in range(400)]}))
    first = next(call).part
    # Nobody reads while the engine goes on to its end: another answer does not wait for this reader.
    assert text_of(ask(server, "other")) == "other "
    rest = [response.part for response in call]
    assert first.num_tokens + sum(part.num_tokens for part in rest) == 400
    assert (first.text + "".join(part.text for part in rest)).split() == [f"{number:02000}" for number in range(400)]


def test_two_readers_share_one_device_by_turns(server: GpuServer) -> None:
    held = ask(server, ENDLESS)
    next(held)
    code, reason, _ = refused(ask(server, "second"))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_BUSY")
    held.cancel()


def test_a_run_that_arrives_goes_first_and_keeps_the_engine(server: GpuServer, tmp_path: Path) -> None:
    call = ask(server, ENDLESS)
    next(call)
    (shim,) = server.shims()
    start = time.monotonic()
    server.start_run("01FIRST", num_steps=2, script={"hold_at": 2, "until_file": str(tmp_path / "go")})
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert error_info(caught.value)[:2] == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_BUSY")
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # what a stream raises is its call, too
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToTimedelta().total_seconds() > 0
    server.wait_for_step(1, "01FIRST")
    # Not timed: it took no engine of its own, and no grace ran out on the way.
    assert time.monotonic() - start < WAIT_SECONDS
    assert [other["shim_pid"] for other in server.shims()] == [shim["shim_pid"]]
    # While it goes on there is no answer, and it hears nothing of the question.
    assert refused(ask(server, "now?"))[1] == "NODE_BUSY"
    (tmp_path / "go").touch()
    payloads = server.watch_to_end("01FIRST")
    assert payloads[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
    assert text_of(ask(server, "now")) == "now "


@pytest.mark.parametrize("ending", [{"fail_after": 1}, {"exit_after": 1}])
def test_an_engine_that_fails_is_not_used_again_and_runs_go_on(server: GpuServer, ending: dict[str, int]) -> None:
    call = ask(server, json.dumps({"words": ["one", "two"], **ending}))
    assert next(call).part.text == "one "
    code, reason, _ = refused(call)
    assert (code, reason) == (grpc.StatusCode.INTERNAL, "GENERATION")
    job_id = f"01AFTER{next(iter(ending)).replace('_', '').upper()}"
    server.start_run(job_id, num_steps=1)
    assert server.watch_to_end(job_id)[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED


@pytest.mark.parametrize("settings", [{}, {"keep_engines": True}])
def test_a_node_that_stops_says_so(tmp_path: Path, settings: dict[str, Any]) -> None:
    server = GpuServer(tmp_path, **settings)
    try:
        call = ask(server.start(), ENDLESS)
        next(call)
        channel, server._channel = server._channel, None
        assert server.terminate() == 0
        assert refused(call)[1] == "NODE_DRAINING"
        assert channel is not None
        channel.close()
        assert bool(server.living_processes()) is bool(settings)
    finally:
        server.clean_up()


def test_a_node_that_stops_while_an_engine_is_being_started_for_an_answer_leaves_none(tmp_path: Path) -> None:
    server = GpuServer(tmp_path)
    try:
        call = ask(server.start(), ENDLESS)
        wait_for(lambda: list((server.data_directory / "engines").iterdir()), what="an engine's directory")
        channel, server._channel = server._channel, None
        assert server.terminate() == 0
        assert refused(call)[1] == "NODE_DRAINING"
        assert channel is not None
        channel.close()
        assert not server.living_processes()
    finally:
        server.clean_up()


def test_a_request_that_cannot_be_written_is_told_with_its_cause(tmp_path: Path) -> None:
    server = GpuServer(tmp_path)
    try:
        server.start()
        requests = server.data_directory / "requests"
        requests.rmdir()
        requests.touch()
        code, reason, _ = refused(ask(server, "hello"))
        assert (code, reason) == (grpc.StatusCode.INTERNAL, "GENERATION")
    finally:
        server.clean_up()


def test_a_server_that_comes_back_ends_what_nobody_reads(tmp_path: Path) -> None:
    server = GpuServer(tmp_path)
    try:
        next(ask(server.start(), ENDLESS))
        (shim,) = server.shims()
        server.kill()
        server.start()
        assert text_of(ask(server, "back")) == "back "
        assert [other["shim_pid"] for other in server.shims()] == [shim["shim_pid"]]
    finally:
        server.clean_up()
