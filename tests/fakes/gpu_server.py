"""A real GPU server process with the stub engine, on a free port, and a client of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from tests.fakes.datasets import make_spec, write_blob
from tests.fakes.gpu_runs import STUB_COMMAND, WAIT_SECONDS, child_environment, is_alive, processes_of, wait_for
from tests.fakes.tiny_models import place_header_only
from tunesmith.common.v1 import event_pb2, training_spec_pb2
from tunesmith.gpu.v1 import (
    blob_service_pb2,
    blob_service_pb2_grpc,
    inference_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
)

INSTALLATION = "installation-1"
_ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20)]


class GpuServer:
    """Starts, kills and restarts a server on one data directory."""

    def __init__(self, root: Path, **settings: Any) -> None:
        """`settings` are flags by their names with underscores."""
        self.root = root
        self.data_directory = root / "node"
        self.models_directory = root / "models"
        # Without spares, also on a GPU: tests count engines, and what they hold.
        self.settings = {"grace_seconds": 20, "orphan_limit_seconds": 300, "spare_engines": 0, **settings}
        # How long a stream of a run's events may take.
        self.watch_seconds = WAIT_SECONDS
        self.engine_command: tuple[str, ...] = STUB_COMMAND
        # What Python runs: the service, or something around it.
        self.module: tuple[str, ...] = ("gpu_service",)
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None
        if not self.models_directory.exists():
            self.base_model = place_header_only(self.models_directory, name="org/name")
        self.dataset = write_blob(self.data_directory / "blobs", 1, _ROWS, "prompt-completion")

    # The process.

    def command(self, *, ready_file: Path | None = None, **settings: Any) -> list[str]:
        """The command line of a server on this data directory."""
        command = [sys.executable, "-m", *self.module]
        flags = {
            "address": "127.0.0.1:0",
            "data_directory": self.data_directory,
            "models_directory": self.models_directory,
            "ready_file": ready_file or self.root / "ready.json",
            **self.settings,
            **settings,
        }
        for name, value in flags.items():
            flag = "--" + name.replace("_", "-")
            command += [flag] if value is True else [flag, str(value)]
        return command

    def environment(self) -> dict[str, str]:
        return child_environment(TUNESMITH_GPU_ENGINE_COMMAND=json.dumps(self.engine_command))

    def start(self) -> GpuServer:
        """Start it and connect; returns once it serves."""
        ready_file = self.root / "ready.json"
        with (self.root / "server.log").open("ab") as log:
            process = subprocess.Popen(self.command(), env=self.environment(), stdout=log, stderr=log)
        self._process = process
        try:
            ready = wait_for(lambda: self._ready(ready_file, process), what="the server's ready file")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_tail()}") from error
        self.address: str = ready["address"]
        self._channel = grpc.insecure_channel(self.address)
        self.runs = run_service_pb2_grpc.RunServiceStub(self._channel)
        self.blobs = blob_service_pb2_grpc.BlobServiceStub(self._channel)
        self.inference = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        return self

    def _ready(self, path: Path, process: subprocess.Popen[bytes]) -> Any:
        assert process.poll() is None, f"the server ended with {process.returncode}\n{self.log_tail()}"
        if not path.exists():
            return None
        content = json.loads(path.read_text())
        return content if content["pid"] == process.pid else None

    def log_tail(self) -> str:
        return (self.root / "server.log").read_text()[-4000:]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM; gives the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        code = self._process.wait(WAIT_SECONDS)
        if self._channel is not None:
            self._channel.close()
        self._process, self._channel = None, None
        return code

    def clean_up(self) -> None:
        """End everything that is left, whatever the test did."""
        if self._process is not None:
            self._end(signal.SIGKILL)
        for directory in self.engine_directories():
            shim = directory / "shim.json"
            if shim.exists():
                pid = json.loads(shim.read_text())["shim_pid"]
                if is_alive(pid) and str(directory).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            for pid in processes_of(directory):
                os.kill(pid, signal.SIGKILL)

    # Engines.

    def engine_directories(self) -> list[Path]:
        directory = self.data_directory / "engines"
        return list(directory.iterdir()) if directory.exists() else []

    def shims(self) -> list[dict[str, Any]]:
        """`shim.json` of every engine that has not ended."""
        living = [path for path in self.engine_directories() if not (path / "exit.json").exists()]
        return [json.loads((path / "shim.json").read_text()) for path in living if (path / "shim.json").exists()]

    def living_processes(self) -> list[int]:
        return [pid for directory in self.engine_directories() for pid in processes_of(directory)]

    # Calls.

    @staticmethod
    def key(job_id: str = "01JOB", attempt: int = 1) -> run_service_pb2.RunKey:
        return run_service_pb2.RunKey(installation_id=INSTALLATION, job_id=job_id, attempt=attempt)

    def run_directory(self, job_id: str = "01JOB", attempt: int = 1) -> Path:
        return self.data_directory / "runs" / job_id / str(attempt)

    def request(
        self,
        job_id: str = "01JOB",
        attempt: int = 1,
        *,
        num_steps: int = 5,
        save_every_steps: int = 0,
        script: dict[str, Any] | None = None,
        **fields: Any,
    ) -> run_service_pb2.StartRunRequest:
        """A request that the node accepts; `fields` are further ones of the request."""
        spec = make_spec(
            [self.dataset],
            base_model="org/name",
            hyperparameters={"num_steps": num_steps, "save_every_steps": save_every_steps, "batch": {"examples": 1}},
            sample_prompts=[{"trait_type": "reasoning", "prompt": json.dumps(script)}] if script else [],
        )
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        return run_service_pb2.StartRunRequest(
            key=self.key(job_id, attempt),
            spec_digest=digest,
            spec=json_format.ParseDict(spec, training_spec_pb2.TrainingSpec()),
            **fields,
        )

    def start_run(self, *arguments: Any, **options: Any) -> run_service_pb2.Run:
        request = self.request(*arguments, **options)
        return self.runs.StartRun(request, timeout=WAIT_SECONDS).run

    def get_run(self, job_id: str = "01JOB", attempt: int = 1) -> run_service_pb2.Run:
        request = run_service_pb2.GetRunRequest(key=self.key(job_id, attempt))
        return self.runs.GetRun(request, timeout=WAIT_SECONDS).run

    def stop_run(
        self, mode: str, *, job_id: str = "01JOB", attempt: int = 1, grace_seconds: float = 0
    ) -> run_service_pb2.Run:
        request = run_service_pb2.StopRunRequest(
            key=self.key(job_id, attempt),
            mode=run_service_pb2.StopMode.Value(f"STOP_MODE_{mode}"),
            grace_seconds=grace_seconds,
        )
        return self.runs.StopRun(request, timeout=WAIT_SECONDS).run

    def watch(
        self, job_id: str = "01JOB", attempt: int = 1, *, after: int = 0
    ) -> Iterator[tuple[int, event_pb2.EventPayload]]:
        """(run sequence, payload) of every event, until the stream ends."""
        request = run_service_pb2.WatchRunRequest(key=self.key(job_id, attempt), after_run_sequence=after)
        for response in self.runs.WatchRun(request, timeout=self.watch_seconds):
            for event in response.events:
                assert event.attempt == attempt
                yield event.run_sequence, event_pb2.EventPayload.FromString(event.payload)

    def watch_to_end(self, job_id: str = "01JOB", attempt: int = 1, *, after: int = 0) -> list[event_pb2.EventPayload]:
        """Every event to the last; asserts that there is no gap and that the last is terminal."""
        seen = list(self.watch(job_id, attempt, after=after))
        assert [sequence for sequence, _ in seen] == list(range(after + 1, after + 1 + len(seen)))
        payloads = [payload for _, payload in seen]
        assert payloads[-1].HasField("run_state"), payloads[-1]
        return payloads

    def wait_for_step(self, step: int, job_id: str = "01JOB", attempt: int = 1) -> int:
        """Wait until a step was done; gives the run sequence of its event."""
        for sequence, payload in self.watch(job_id, attempt):
            if payload.step.step == step:
                return sequence
        raise AssertionError(f"the run ended before step {step}")

    def wait_for_phase(self, name: str, job_id: str = "01JOB", attempt: int = 1) -> None:
        wanted = event_pb2.Phase.Value(f"PHASE_{name}")
        assert any(payload.phase.phase == wanted for _, payload in self.watch(job_id, attempt))

    def write_blob(
        self, content: bytes, *, sha256: str | None = None, offset: int = 0, size_bytes: int | None = None
    ) -> blob_service_pb2.WriteBlobResponse:
        """Write `content` from the offset on, in small chunks."""
        size = len(content) if size_bytes is None else size_bytes
        digest = sha256 or hashlib.sha256(content).hexdigest()
        chunks = [content[start : start + 1000] for start in range(offset, len(content), 1000)] or [b""]
        first = blob_service_pb2.WriteBlobRequest(sha256=digest, size_bytes=size, offset=offset, chunk=chunks[0])
        rest = [blob_service_pb2.WriteBlobRequest(chunk=chunk) for chunk in chunks[1:]]
        return self.blobs.WriteBlob(iter([first, *rest]), timeout=WAIT_SECONDS)

    def read_blob(self, sha256: str, *, offset: int = 0) -> bytes:
        request = blob_service_pb2.ReadBlobRequest(sha256=sha256, offset=offset)
        return b"".join(response.chunk for response in self.blobs.ReadBlob(request, timeout=WAIT_SECONDS))


def error_info(error: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """(code, reason, metadata) of a refused call."""
    status: status_pb2.Status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert status is not None, error
    assert any(detail.Unpack(info) for detail in status.details), error
    assert info.domain == "tunesmith"
    return error.code(), info.reason, dict(info.metadata)
