"""What trials of full disks look at: the pair through its interface, its files and its processes. Changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.fakes.pair import STUB_ENGINE, PairUnderTest, running_pair
from tests.fakes.tiny_models import place_header_only
from tests.faults.full_disk import Ledger
from tunesmith.common.v1 import event_pb2
from tunesmith_client import TunesmithError

SUCCEEDED = event_pb2.JOB_STATE_SUCCEEDED


@contextmanager
def stub_pair(directory: Path) -> Iterator[PairUnderTest]:
    os.environ["TUNESMITH_GPU_ENGINE_COMMAND"] = json.dumps(STUB_ENGINE)
    base_model = place_header_only(directory / "models")
    with running_pair(directory / "data", directory / "models", base_model) as pair:
        yield pair


def pids_of(pair: PairUnderTest) -> tuple[int, int]:
    return pair.pair.control.pid, pair.pair.gpu.pid


def is_ready(pair: PairUnderTest, *, service: str = "") -> bool:
    with grpc.insecure_channel(pair.client.config.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30.0)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def state_of(pair: PairUnderTest, job_id: str) -> event_pb2.JobState.ValueType:
    return pair.client.jobs.get(job_id).state


def refusal_of(call: Callable[[], object]) -> tuple[grpc.StatusCode | None, str] | None:
    try:
        call()
    except TunesmithError as error:
        return error.code, error.reason
    return None


def events_of(pair: PairUnderTest, job_id: str) -> list[event_pb2.Event]:
    return list(pair.client.jobs.events(job_id))


def is_empty(directory: Path) -> bool:
    return not list(directory.iterdir())


def has_succeeded(pair: PairUnderTest, job_id: str) -> bool:
    return state_of(pair, job_id) == SUCCEEDED


def has_warned(pair: PairUnderTest, job_id: str, code: str) -> bool:
    return code in warnings_of(pair, job_id)


def warnings_of(pair: PairUnderTest, job_id: str) -> set[str]:
    return {event.payload.warning.code for event in events_of(pair, job_id) if event.payload.HasField("warning")}


def messages_of(pair: PairUnderTest, job_id: str) -> list[str]:
    """Of the job's changes of state."""
    return [event.payload.job_state.message for event in events_of(pair, job_id) if event.payload.HasField("job_state")]


def last_checkpoint(pair: PairUnderTest, job_id: str) -> int:
    steps = [
        event.payload.checkpoint.step
        for event in events_of(pair, job_id)
        if event.payload.checkpoint.status == event_pb2.CHECKPOINT_STATUS_COMMITTED
    ]
    return max(steps, default=0)


def hold_log(pair: PairUnderTest, job_id: str, ledger: Ledger) -> list[event_pb2.Event]:
    events = events_of(pair, job_id)
    numbers = [event.sequence for event in events]
    ledger.hold("the job's log is 1..n without a gap or a duplicate", numbers == list(range(1, len(numbers) + 1)))
    return events


def hold_integrity(database: Path, ledger: Ledger) -> None:
    try:
        from pysqlite3 import dbapi2 as sqlite
    except ImportError:
        import sqlite3 as sqlite
    connection = sqlite.connect(database)
    try:
        ledger.hold("the database is whole", connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])
    finally:
        connection.close()


def checkpoints_are_whole(data: Path, job_id: str) -> bool:
    manifests = list((data / "node-local/runs" / job_id).glob("*/checkpoints/step-*/manifest.json"))
    return bool(manifests) and all(
        _is_whole(manifest.parent / file["path"], file["sha256"])
        for manifest in manifests
        for file in json.loads(manifest.read_text())["files"]
    )


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def adapter_is_whole(output: Path, job_id: str) -> bool:
    found = list(output.glob(f"*/{job_id}/adapter/adapter_model.safetensors"))
    return len(found) == 1 and found[0].stat().st_size > 0


def stands_still(journal: Path) -> bool:
    before = journal.stat().st_size
    time.sleep(1.0)
    return journal.stat().st_size == before
