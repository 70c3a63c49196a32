"""Around the services: health, reflection, exact plans by the planner process, settings, logs, imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gpu_service.shim import process_tree
from tests.fakes.datasets import write_blob
from tests.fakes.gpu_runs import WAIT_SECONDS, child_environment, wait_for
from tests.fakes.gpu_server import INSTALLATION, GpuServer, error_info
from tunesmith.common.v1 import plan_pb2
from tunesmith.gpu.v1 import run_service_pb2


def test_health_and_reflection_answer(server: GpuServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        # These two stubs are only partly typed.
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "liveness", "tunesmith.gpu.v1.RunService", "tunesmith.gpu.v1.BlobService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert health.Check(request, timeout=WAIT_SECONDS).status == health_pb2.HealthCheckResponse.SERVING
        request_class: Any = reflection_pb2.ServerReflectionRequest
        asked = request_class(file_containing_symbol="tunesmith.gpu.v1.RunService")
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        [answer] = stub.ServerReflectionInfo(iter([asked]), timeout=WAIT_SECONDS)
        files = [FileDescriptorProto.FromString(raw) for raw in answer.file_descriptor_response.file_descriptor_proto]
        assert any(service.name == "RunService" for file in files for service in file.service)


def test_an_exact_plan_comes_from_the_planner(server: GpuServer) -> None:
    request = run_service_pb2.PlanRunRequest(
        spec=server.request(num_steps=7).spec, level=plan_pb2.PLAN_LEVEL_EXACT, installation_id=INSTALLATION
    )
    plan = server.runs.PlanRun(request, timeout=WAIT_SECONDS).plan
    assert (plan.level, plan.num_steps) == (plan_pb2.PLAN_LEVEL_EXACT, 7)
    assert len(plan.data_digest) == 64
    assert plan.total_target_tokens > 0
    again = server.runs.PlanRun(request, timeout=WAIT_SECONDS).plan
    assert again == plan
    assert list((server.data_directory / "requests").iterdir()) == []


def test_a_refusal_of_the_planner_is_the_calls_error(server: GpuServer) -> None:
    broken = b'{"prompt": "a", "completion": "b"}\n{"prompt": broken\n'
    digest = write_blob(server.data_directory / "blobs", 1, broken, "prompt-completion")["sha256"]
    request = run_service_pb2.PlanRunRequest(spec=server.request().spec, level=plan_pb2.PLAN_LEVEL_EXACT)
    request.spec.datasets[0].sha256 = digest
    request.spec.datasets[0].size_bytes = len(broken)
    request.spec.datasets[0].num_examples = 2
    with pytest.raises(grpc.RpcError) as refused:
        server.runs.PlanRun(request, timeout=WAIT_SECONDS)
    code, reason, _ = error_info(refused.value)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_MALFORMED")


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        (["--grace-seconds", "-1"], {}),
        (["--grace-seconds", "soon"], {}),
        (["--name", "Not A Name"], {}),
        (["--address", "50052"], {}),
        (["--no-such-flag"], {}),
        ([], {"TUNESMITH_GPU_GRACE": "3"}),
        ([], {"TUNESMITH_GPU_ENGINE_COMMAND": "not json"}),
    ],
)
def test_bad_settings_end_with_status_2(tmp_path: Path, flags: list[str], variables: dict[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "gpu_service", *flags],
        env=child_environment(**variables),
        cwd=tmp_path,
        capture_output=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_server_process_imports_no_training_library() -> None:
    program = "import gpu_service.main, json, sys; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    output = subprocess.check_output([sys.executable, "-c", program], env=child_environment(), timeout=WAIT_SECONDS)
    loaded = set(json.loads(output))
    assert "gpu_service" in loaded
    assert not loaded & {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "tokenizers"}


def test_logs_are_json_lines_with_the_callers_request_id(server: GpuServer) -> None:
    request = run_service_pb2.ListRunsRequest(installation_id=INSTALLATION)
    server.runs.ListRuns(request, timeout=WAIT_SECONDS, metadata=(("x-request-id", "request-42"),))
    server.terminate()
    lines = [json.loads(line) for line in (server.root / "server.log").read_text().splitlines()]
    [call] = [line for line in lines if line.get("request_id") == "request-42"]
    assert (call["event"], call["outcome"], call["service"]) == ("call", "OK", "gpu")


def test_lines_about_a_run_carry_its_ids_and_no_other_runs(server: GpuServer) -> None:
    """One engine serves both: what its tasks log about the second must not carry what the first was started with."""
    hold = {"hold_at": 2, "until_file": "/nowhere"}
    for job_id, script in (("01FIRST", None), ("01SECOND", hold)):
        metadata = (("x-request-id", f"request-{job_id}"),)
        server.runs.StartRun(server.request(job_id, script=script), timeout=WAIT_SECONDS, metadata=metadata)
        if script is None:
            server.watch_to_end(job_id)
    server.wait_for_step(1, "01SECOND")
    [shim] = server.shims()
    os.kill(shim["engine_pid"], signal.SIGKILL)
    server.watch_to_end("01SECOND")
    path = server.root / "server.log"
    wait_for(lambda: "engine-ended" in path.read_text(), what="the line about the engine's end")
    server.terminate()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_event = {(line["event"], line.get("job_id")): line for line in lines}
    for job_id in ("01FIRST", "01SECOND"):
        assert by_event["run-accepted", job_id]["request_id"] == f"request-{job_id}"
    assert by_event["engine-started", "01FIRST"]["request_id"] == "request-01FIRST"
    ended = by_event["engine-ended", "01SECOND"]
    assert (ended["attempt"], ended["signal"]) == (1, signal.SIGKILL)
    assert "request_id" not in ended


def test_a_caller_that_goes_away_ends_the_planner(server: GpuServer) -> None:
    rows = [{"prompt": f"question {number} " * 20, "completion": "answer"} for number in range(200_000)]
    dataset = write_blob(server.data_directory / "blobs", 1, rows, "prompt-completion")
    request = run_service_pb2.PlanRunRequest(spec=server.request().spec, level=plan_pb2.PLAN_LEVEL_EXACT)
    json_format.ParseDict(dataset, request.spec.datasets[0])
    call = server.runs.PlanRun.future(request, timeout=WAIT_SECONDS)
    [planner] = wait_for(lambda: planners_of(server), what="the planner")
    call.cancel()
    wait_for(lambda: not planners_of(server), what="the planner's end")
    assert not Path(f"/proc/{planner}").exists()
    # Killed, not waited for: it left no plan.
    assert list((server.data_directory / "cache" / "plans").glob("[!.]*")) == []
    assert list((server.data_directory / "requests").iterdir()) == []
    # The next one does not wait for it.
    small = run_service_pb2.PlanRunRequest(spec=server.request().spec, level=plan_pb2.PLAN_LEVEL_EXACT)
    assert server.runs.PlanRun(small, timeout=WAIT_SECONDS).plan.level == plan_pb2.PLAN_LEVEL_EXACT


def planners_of(server: GpuServer) -> list[int]:
    """Children of the server that plan, also those that ended and were not reaped."""
    return [pid for pid in process_tree.children(server.pid) if b"planner" in command_of(pid) or not command_of(pid)]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b"gone"
