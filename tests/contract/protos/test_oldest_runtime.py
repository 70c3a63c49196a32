"""The generated stubs load, and speak with today's, on the oldest runtime pair that the distribution allows."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grpc
import pytest

from tunesmith.control.v1 import job_service_pb2, job_service_pb2_grpc

ROOT = Path(__file__).parents[3]

# Imports every generated module, then calls a server that runs on the newest pair.
CLIENT = """
import importlib, pathlib, sys
import google.protobuf, grpc
root = pathlib.Path(sys.argv[1])
for path in sorted((root / "tunesmith").rglob("*_pb2*.py")):
    importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
from tunesmith.control.v1 import job_service_pb2, job_service_pb2_grpc
with grpc.insecure_channel(sys.argv[2]) as channel:
    stub = job_service_pb2_grpc.JobServiceStub(channel)
    job = stub.GetJob(job_service_pb2.GetJobRequest(job_id="01J"), timeout=30).job
print(google.protobuf.__version__, grpc.__version__, job.job_id)
"""


class Jobs(job_service_pb2_grpc.JobServiceServicer):
    async def GetJob(  # noqa: N802 - the name is the contract's
        self, request: job_service_pb2.GetJobRequest, context: object
    ) -> job_service_pb2.GetJobResponse:
        return job_service_pb2.GetJobResponse(job=job_service_pb2.Job(job_id=request.job_id + "X"))


def lowest(requirement: str) -> str:
    """`protobuf>=6.33.5,<8` -> `protobuf==6.33.5`."""
    match = re.match(r"([a-zA-Z-]+)>=([0-9.]+)", requirement)
    assert match is not None
    return f"{match[1]}=={match[2]}"


@pytest.fixture
def oldest_python(tmp_path: Path) -> tuple[Path, list[str]]:
    """An interpreter with the oldest pair, and that pair's versions: protobuf, grpcio."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = [lowest(requirement) for requirement in declared if requirement.startswith(("protobuf", "grpcio>="))]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *oldest], check=True)
    return python, [item.split("==")[1] for item in oldest]


@pytest.mark.slow
async def test_the_stubs_work_on_the_oldest_allowed_pair(oldest_python: tuple[Path, list[str]]) -> None:
    python, versions = oldest_python
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    job_service_pb2_grpc.add_JobServiceServicer_to_server(Jobs(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        process = await asyncio.create_subprocess_exec(
            python,
            "-c",
            CLIENT,
            ROOT / "clients" / "python",
            f"127.0.0.1:{port}",
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT / "clients" / "python")},
        )
        output, _ = await process.communicate()
    finally:
        await server.stop(None)
    assert process.returncode == 0
    protobuf, grpcio, job_id = output.decode().split()
    assert protobuf == versions[0]
    assert grpcio.startswith(versions[1])
    assert job_id == "01JX"
