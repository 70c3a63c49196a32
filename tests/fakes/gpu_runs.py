"""Makes run directories and engine directories as the GPU server does, and waits for conditions. Knows no gRPC."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_service.journal import Reader, RunSummary, summarize
from gpu_service.shim.configuration import EngineConfiguration
from tunesmith.common.v1 import event_pb2

WAIT_SECONDS = 60.0
_ROOT = Path(__file__).parents[2]
STUB_COMMAND = (sys.executable, "-m", "tests.fakes.stub_engine")


def child_environment(**added: str) -> dict[str, str]:
    """The environment for a process of ours, started from a checkout that may not be installed."""
    paths = (str(_ROOT), str(_ROOT / "clients/python"), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), **added}


def write_run(
    root: Path, *, attempt: int = 1, num_steps: int = 3, save_every_steps: int = 0, script: dict[str, Any] | None = None
) -> Path:
    """A run directory with a `run.json` that the stub engine can train."""
    directory = root / "runs" / "01JOB" / str(attempt)
    directory.mkdir(parents=True)
    spec: dict[str, Any] = {
        "base_model": "org/name",
        "hyperparameters": {"num_steps": num_steps, "save_every_steps": save_every_steps},
    }
    if script:
        spec["sample_prompts"] = [{"prompt": json.dumps(script)}]
    run = {"installation_id": "i", "job_id": "01JOB", "attempt": attempt, "spec_digest": "s", "spec": spec}
    run |= {"weights_digest": "w", "model_directory": "/nowhere", "resume": None}
    (directory / "run.json").write_text(json.dumps(run))
    return directory


def write_engine(
    root: Path,
    *,
    orphan_limit_seconds: float = 600,
    argv: tuple[str, ...] = STUB_COMMAND,
    device_type: str = "cpu",
    **limits: Any,
) -> Path:
    """An engine directory for the stub engine; `limits` are further fields of its configuration."""
    directory = root / "engines" / "e1"
    directory.mkdir(parents=True)
    EngineConfiguration(
        argv=argv,
        environment={},
        device={"type": device_type, "index": -1 if device_type == "cpu" else 0},
        orphan_limit_seconds=orphan_limit_seconds,
        grace_seconds=30,
        **{"hang_limit_seconds": 600, **limits},
    ).write(directory)
    return directory


class ShimConnection:
    """A blocking connection to a shim, as a test's server."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT_SECONDS)
        descriptor = os.open(directory, os.O_PATH)
        try:
            # Not there, then bound, then listening.
            wait_for(lambda: self._socket.connect_ex(f"/proc/self/fd/{descriptor}/shim.sock") == 0)
        finally:
            os.close(descriptor)
        self._stream = self._socket.makefile("rb")

    def send(self, **message: Any) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, kind: str) -> dict[str, Any]:
        """The next message of a kind; others are skipped. EOFError when the shim closed."""
        for line in self._stream:
            message: dict[str, Any] = json.loads(line)
            if message["type"] == kind:
                return message
        raise EOFError(kind)

    def status(self) -> dict[str, Any]:
        self.send(type="status")
        return self.receive("status")

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


def wait_for(condition: Callable[[], Any], *, what: str = "the condition") -> Any:
    """Wait until the condition gives something true, and give that."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come true within {WAIT_SECONDS} s")


async def wait_until(condition: Callable[[], Any], *, what: str = "the condition") -> Any:
    """`wait_for` on the event loop."""
    return await asyncio.to_thread(wait_for, condition, what=what)


def summary_of(directory: Path) -> RunSummary:
    return summarize(directory / "journal")


def has_done_step(directory: Path, step: int) -> bool:
    """Whether the run's journal has the step."""
    return any(payload.step.step == step for payload in payloads(directory))


def payloads(directory: Path) -> list[event_pb2.EventPayload]:
    """Every event of a journal, none when there is no journal; asserts that its sequence has no gap."""
    if not (directory / "journal").exists():
        return []
    with Reader(directory / "journal") as reader:
        records = reader.read(0, limit=100_000, limit_bytes=1 << 30)
    assert [record.run_sequence for record in records] == list(range(1, len(records) + 1))
    return [event_pb2.EventPayload.FromString(record.decode().payload) for record in records]


def is_alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return content[content.rindex(")") + 2] != "Z"


def processes_of(engine_directory: Path) -> list[int]:
    """Living processes that were started by an engine of this directory."""
    from gpu_service.shim.engine_process import ENGINE_MARK
    from gpu_service.shim.process_tree import with_environment

    return [pid for pid in with_environment(ENGINE_MARK, str(engine_directory)) if is_alive(pid)]
