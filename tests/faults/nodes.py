"""A GPU server process of one trial, with what is left of it ended behind the trial, and what trials ask of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_service.journal import Reader
from tests.fakes.gpu_server import GpuServer
from tests.fakes.tiny_models import TinyOptions, place
from tunesmith.common.v1 import event_pb2


@contextmanager
def running_node(
    directory: Path,
    *,
    real_engine: str = "",
    fake_devices: bool = False,
    watch_seconds: float | None = None,
    **settings: Any,
) -> Iterator[GpuServer]:
    """A started server with the stub engine; `real_engine` names a module that trains a tiny llama instead.

    `fake_devices`: it has two GPUs that are not there, whose files lie in `directory`. `watch_seconds`: how long
    watching a run may take.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if real_engine:
        place(directory / "models", TinyOptions(), name="org/name")
    server = GpuServer(directory, **settings)
    if watch_seconds is not None:
        server.watch_seconds = watch_seconds
    if fake_devices:
        server.module = ("tests.fakes.fake_device_server", str(directory))
    if real_engine:
        server.engine_command = (sys.executable, "-m", real_engine)
    try:
        yield server.start()
    finally:
        server.clean_up()


def times(run_directory: Path) -> list[float]:
    """When each event of a run was written, in seconds since the epoch."""
    with Reader(run_directory / "journal") as reader:
        records = reader.read(0, limit=100_000, limit_bytes=1 << 30)
    return [record.decode().time.ToNanoseconds() / 1e9 for record in records]


def last_pause_seconds(run_directory: Path, closing_events: int) -> float:
    """From the last event that an engine wrote of a run to the first of the `closing_events` that its shim wrote."""
    written = times(run_directory)
    return written[-closing_events] - written[-closing_events - 1]


def log_lines(events: Sequence[event_pb2.EventPayload]) -> list[str]:
    """Messages of the log events."""
    return [payload.log.message for payload in events if payload.HasField("log")]


def seconds_since(start: float) -> float:
    return time.monotonic() - start
