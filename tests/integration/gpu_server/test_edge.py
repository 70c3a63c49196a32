"""Around the services: health, reflection, exact plans by the planner process, settings, logs, imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.fakes.datasets import write_blob
from tests.fakes.gpu_runs import WAIT_SECONDS, child_environment
from tests.fakes.gpu_server import INSTALLATION, GpuServer, error_info
from tunesmith.common.v1 import plan_pb2
from tunesmith.gpu.v1 import run_service_pb2


def test_health_and_reflection_answer(server: GpuServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        # These two stubs are only partly typed.
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "tunesmith.gpu.v1.RunService", "tunesmith.gpu.v1.BlobService"):
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
