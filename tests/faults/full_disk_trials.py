"""What is tried on full disks: each place at which the pair writes is out of room once, and nothing is restarted.

Every trial runs in a mount namespace (`full_disk`). Refuses to look at the services but through their interface, their
files, and their processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.fakes.pair import STUB_ENGINE, PairUnderTest, running_pair
from tests.fakes.tiny_models import place, place_header_only
from tests.faults.full_disk import Ledger, Volume
from tunesmith.common.v1 import event_pb2, training_spec_pb2
from tunesmith_client import TunesmithError

_MEBIBYTE = 1024**2
_SUCCEEDED = event_pb2.JOB_STATE_SUCCEEDED


@contextmanager
def _stub_pair(directory: Path) -> Iterator[PairUnderTest]:
    os.environ["TUNESMITH_GPU_ENGINE_COMMAND"] = json.dumps(STUB_ENGINE)
    base_model = place_header_only(directory / "models")
    with running_pair(directory / "data", directory / "models", base_model) as pair:
        yield pair


def _database(directory: Path, ledger: Ledger) -> None:
    """Control's database and its log have no room: calls say so, what is acknowledged stays, and it heals alone."""
    data = directory / "data"
    volume = Volume(data / "control", size_bytes=12 * _MEBIBYTE)
    for name in ("blobs", "output"):
        Volume(data / "control" / name, size_bytes=32 * _MEBIBYTE)
    with _stub_pair(directory) as pair:
        pids = _pids(pair)
        held = directory / "go"
        job = pair.start("held", num_steps=30, script={"hold_at": 10, "until_file": str(held)})
        pair.wait_for_step(job.job_id, 9)
        project = pair.project("second")
        with volume.full():
            refusals = [error for n in range(60) if (error := _refusal(partial(pair.project, f"more-{n}")))]
            ledger.hold("a call that finds no room in the database is refused", refusals)
            ledger.hold(
                f"the refusal is RESOURCE_EXHAUSTED with DISK_FULL, not {refusals[:1]}",
                all(refusal == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL") for refusal in refusals),
            )
            ledger.comes_true("readiness says so", lambda: not _is_ready(pair))
            ledger.hold("the process is alive all the same", _is_ready(pair, service="liveness"))
            ledger.hold("reads are answered", pair.client.jobs.get(job.job_id).job_id == job.job_id)
            held.touch()
            # The run ends on its node meanwhile.
            run = data / "node-local/runs" / job.job_id / "1/artifacts/manifest.json"
            ledger.comes_true("the run goes on while control cannot write", run.exists)
        ledger.comes_true("readiness comes back alone", lambda: _is_ready(pair))
        ledger.comes_true("the job ends well once there is room", lambda: _state(pair, job.job_id) == _SUCCEEDED)
        _hold_log(pair, job.job_id, ledger)
        later = pair.client.jobs.start(project.project_id)
        ledger.comes_true("new work is taken", lambda: _state(pair, later.job_id) == _SUCCEEDED)
        ledger.hold("no service was restarted", _pids(pair) == pids)
    _hold_integrity(data / "control/control.sqlite", ledger)


def _blobs(directory: Path, ledger: Ledger) -> None:
    """Control's store of bytes has no room: uploads are refused whole, and a job waits with its artifacts."""
    data = directory / "data"
    volume = Volume(data / "control/blobs", size_bytes=16 * _MEBIBYTE)
    output = Volume(data / "control/output", size_bytes=16 * _MEBIBYTE)
    with _stub_pair(directory) as pair:
        pids = _pids(pair)
        for name, full in (("blobs", volume), ("output", output)):
            held = directory / f"go-{name}"
            job = pair.start(name, num_steps=4, script={"hold_at": 2, "until_file": str(held)})
            pair.wait_for_step(job.job_id, 1)
            with full.full():
                if full is volume:
                    refusal = _refusal(lambda: pair.project("refused"))
                    expected = (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
                    ledger.hold(f"an upload is refused with DISK_FULL, not {refusal}", refusal == expected)
                    staging = data / "control/blobs/staging"
                    ledger.comes_true("nothing of it stays", partial(_is_empty, staging))
                held.touch()
                ledger.comes_true(
                    f"the log says that the artifacts wait for room ({name})",
                    partial(_has_warned, pair, job.job_id, "collecting-waits-for-room"),
                )
                ledger.hold("the job is not over", _state(pair, job.job_id) == event_pb2.JOB_STATE_RUNNING)
            ledger.comes_true(
                f"the job ends well once there is room ({name})",
                partial(_has_succeeded, pair, job.job_id),
            )
            _hold_log(pair, job.job_id, ledger)
            ledger.hold("its adapter is whole", _adapter_is_whole(data / "control/output", job.job_id))
        ledger.hold("no service was restarted", _pids(pair) == pids)
    _hold_integrity(data / "control/control.sqlite", ledger)


def _save(directory: Path, ledger: Ledger) -> None:
    """The node's disk has no room for a checkpoint: it is left out and said, and training goes on."""
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=48 * _MEBIBYTE)
    with _stub_pair(directory) as pair:
        pids = _pids(pair)
        full = directory / "full"
        script = {"hold_at": 12, "until_file": str(full), "step_seconds": 0.1}
        job = pair.start("trains", num_steps=40, save_every_steps=5, script=script)
        pair.wait_for_step(job.job_id, 11)
        with volume.full():
            full.touch()
            ledger.comes_true(
                "the log says that a checkpoint was left out",
                lambda: "checkpoint-failed" in _warnings(pair, job.job_id),
            )
            ledger.hold("earlier checkpoints are whole", _checkpoints_are_whole(data, job.job_id))
        ledger.comes_true("a later save succeeds", lambda: _last_checkpoint(pair, job.job_id) > 15)
        ledger.comes_true("the job ends well", lambda: _state(pair, job.job_id) == _SUCCEEDED)
        ledger.hold("it needed one attempt", pair.client.jobs.get(job.job_id).attempt == 1)
        _hold_log(pair, job.job_id, ledger)
        ledger.hold("no service was restarted", _pids(pair) == pids)
    _hold_integrity(data / "control/control.sqlite", ledger)


def _start(directory: Path, ledger: Ledger) -> None:
    """The node's disk has no room for what a run would leave: the run waits in the queue until there is."""
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=48 * _MEBIBYTE)
    with _stub_pair(directory) as pair:
        pids = _pids(pair)
        waiting = pair.project("waits")
        with volume.full():
            queued = pair.client.jobs.start(waiting.project_id)
            ledger.comes_true(
                "a run for which the node has no room waits, and says why",
                lambda: any("DISK_FULL" in text for text in _messages(pair, queued.job_id)),
            )
            ledger.hold("it is no failed attempt", not any("retry" in text for text in _messages(pair, queued.job_id)))
        ledger.comes_true("the one that waited ends well", lambda: _state(pair, queued.job_id) == _SUCCEEDED)
        _hold_log(pair, queued.job_id, ledger)
        # Room for its data, and not for a checkpoint and the artifacts.
        small = pair.project("small")
        volume.fill(leave_bytes=_MEBIBYTE)
        try:
            queued = pair.client.jobs.start(small.project_id)
            ledger.comes_true(
                "a node tells how much a run needs and how much is free",
                lambda: any("bytes; " in text for text in _messages(pair, queued.job_id)),
            )
        finally:
            volume.empty()
        ledger.comes_true("it ends well", lambda: _state(pair, queued.job_id) == _SUCCEEDED)
        ledger.hold("no service was restarted", _pids(pair) == pids)
    _hold_integrity(data / "control/control.sqlite", ledger)


def _journal(directory: Path, ledger: Ledger) -> None:
    """The journal has no room for further events: training stands still, and nothing is lost or told twice."""
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=48 * _MEBIBYTE)
    num_steps = 20_000
    with _stub_pair(directory) as pair:
        pids = _pids(pair)
        job = pair.start("writes", num_steps=num_steps, script={"step_seconds": 0})
        pair.wait_for_step(job.job_id, 10)
        journal = data / "node-local/runs" / job.job_id / "1/journal"
        with volume.full():
            ledger.comes_true("training stands still when its events find no room", lambda: _stands_still(journal))
            ledger.hold("the job is not over", _state(pair, job.job_id) == event_pb2.JOB_STATE_RUNNING)
        ledger.comes_true("the job ends well", lambda: _state(pair, job.job_id) == _SUCCEEDED)
        events = _hold_log(pair, job.job_id, ledger)
        steps = [event.payload.step.step for event in events if event.payload.HasField("step")]
        ledger.hold("every step is told once", steps == list(range(1, num_steps + 1)))
        ledger.hold("no service was restarted", _pids(pair) == pids)


def _cancel(directory: Path, ledger: Ledger) -> None:
    """A run on a full disk can be cancelled: its closing events have room of their own."""
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=48 * _MEBIBYTE)
    with _stub_pair(directory) as pair:
        pids = _pids(pair)
        job = pair.start("stopped", num_steps=1_000_000, script={"step_seconds": 0.01})
        pair.wait_for_step(job.job_id, 5)
        with volume.full():
            pair.client.jobs.cancel(job.job_id)
            ledger.comes_true(
                "a cancel is carried out on a full disk",
                lambda: _state(pair, job.job_id) == event_pb2.JOB_STATE_CANCELLED,
            )
            _hold_log(pair, job.job_id, ledger)
        after = pair.start("after", num_steps=3)
        ledger.comes_true("new work is done", lambda: _state(pair, after.job_id) == _SUCCEEDED)
        ledger.hold("no service was restarted", _pids(pair) == pids)


def _killed(directory: Path, ledger: Ledger) -> None:
    """An engine that dies on a full disk: its end is named, and the next attempt waits for room."""
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=48 * _MEBIBYTE)
    with _stub_pair(directory) as pair:
        pids = _pids(pair)
        job = pair.start("dies", num_steps=60, save_every_steps=5, script={"step_seconds": 0.1})
        pair.wait_for_step(job.job_id, 6)
        with volume.full():
            pair.kill_engine()
            ledger.comes_true(
                "the attempt's end is named", lambda: "ENGINE_KILLED" in " ".join(_messages(pair, job.job_id))
            )
        ledger.comes_true("the job ends well", lambda: _state(pair, job.job_id) == _SUCCEEDED)
        ledger.hold("no service was restarted", _pids(pair) == pids)
        _hold_log(pair, job.job_id, ledger)


def _training(directory: Path, ledger: Ledger) -> None:
    """Real training: a save without room is left out, the next one succeeds; artifacts without room are tried again."""
    os.environ |= {"OMP_NUM_THREADS": "1"}
    os.environ.pop("TUNESMITH_GPU_ENGINE_COMMAND", None)
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=64 * _MEBIBYTE)
    base_model = place(directory / "models")
    with running_pair(directory / "data", directory / "models", base_model) as pair:
        pids = _pids(pair)
        job = pair.start(
            "real",
            num_steps=150,
            save_every_steps=10,
            keep_checkpoints=100,
            training_type="lora",
            max_length=64,
            batch=training_spec_pb2.Batch(examples=2),
            lora=training_spec_pb2.Lora(rank=4),
        )
        pair.wait_for_step(job.job_id, 12)
        with volume.full():
            ledger.comes_true(
                "the log says that a checkpoint was left out",
                lambda: "checkpoint-failed" in _warnings(pair, job.job_id),
            )
            left_out = pair.client.jobs.get(job.job_id).progress.step
            ledger.hold("earlier checkpoints are whole", _checkpoints_are_whole(data, job.job_id))
        ledger.comes_true("a later save succeeds", lambda: _last_checkpoint(pair, job.job_id) > left_out)
        pair.wait_for_step(job.job_id, 130)
        volume.fill()
        try:
            ledger.comes_true(
                "artifacts that find no room are a typed failure, tried again",
                lambda: any("retry after DISK_FULL" in text for text in _messages(pair, job.job_id)),
            )
            ledger.comes_true(
                "the next attempt waits for room",
                lambda: any(text.startswith("node local: DISK_FULL") for text in _messages(pair, job.job_id)),
            )
            ledger.hold("checkpoints are whole", _checkpoints_are_whole(data, job.job_id))
        finally:
            volume.empty()
        ledger.comes_true("the job ends well", lambda: _state(pair, job.job_id) == _SUCCEEDED)
        events = _hold_log(pair, job.job_id, ledger)
        resumed = [event.payload.resumed.from_step for event in events if event.payload.HasField("resumed")]
        ledger.hold(f"it went on from a checkpoint, not from {resumed}", resumed and resumed[0] >= 120)
        ledger.hold("its adapter is whole", _adapter_is_whole(data / "control/output", job.job_id))
        ledger.hold("no service was restarted", _pids(pair) == pids)
    _hold_integrity(data / "control/control.sqlite", ledger)


def _backup(directory: Path, ledger: Ledger) -> None:
    """Where a backup goes there is no room: it says so, leaves nothing, and an earlier backup is as it was."""
    data, volume = directory / "data", Volume(directory / "backups", size_bytes=24 * _MEBIBYTE)
    with _stub_pair(directory) as pair:
        pids = _pids(pair)
        job = pair.start("first", num_steps=3)
        ledger.comes_true("the job ends well", partial(_has_succeeded, pair, job.job_id))
        # Room for no database; for the database, and not for all blobs.
        for number, leave_bytes in enumerate((0, 64 * 1024, 400 * 1024)):
            target = volume.directory / f"new-{number}"
            volume.fill(leave_bytes=leave_bytes)
            status, words = _chore("backup", "--data-directory", data / "control", "--to", target)
            volume.empty()
            if status == 0:
                continue
            ledger.hold(f"it ends with 1, not {status}", status == 1)
            ledger.hold(f"it says why, without a trace: {words[-300:]!r}", "full" in words or "No space" in words)
            ledger.hold(f"it does not show its insides: {words[-300:]!r}", "Traceback" not in words)
            left = [path for path in target.rglob("*") if path.is_file()] if target.exists() else []
            ledger.hold(f"nothing is left that looks like a backup: {left}", not left)
        ledger.hold("a disk without room was tried", ledger.tried > 1)
        kept = volume.directory / "kept"
        status, words = _chore("backup", "--data-directory", data / "control", "--to", kept)
        ledger.hold(f"with room it is made: {words}", status == 0)
        before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
        later = pair.start("second", num_steps=3)
        ledger.comes_true("the later job ends well", partial(_has_succeeded, pair, later.job_id))
        with volume.full():
            status, _ = _chore("backup", "--data-directory", data / "control", "--to", kept)
        ledger.hold("the earlier backup is not renewed without room", status == 1)
        after = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
        ledger.hold("the earlier backup is as it was", before == after)
        restored = directory / "restored"
        status, words = _chore("restore", "--from", kept, "--data-directory", restored)
        ledger.hold(f"it can be put back: {words}", status == 0)
        ledger.hold("no service was restarted", _pids(pair) == pids)


def _chore(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "control_service", *(str(argument) for argument in arguments)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True)
    return ended.returncode, ended.stdout


TRIALS: Mapping[str, Callable[[Path, Ledger], None]] = {
    "database": _database,
    "blobs": _blobs,
    "backup": _backup,
    "save": _save,
    "start": _start,
    "journal": _journal,
    "cancel": _cancel,
    "killed": _killed,
    "training": _training,
}


# What is looked at.


def _pids(pair: PairUnderTest) -> tuple[int, int]:
    return pair.pair.control.pid, pair.pair.gpu.pid


def _is_ready(pair: PairUnderTest, *, service: str = "") -> bool:
    with grpc.insecure_channel(pair.client.config.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30.0)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _state(pair: PairUnderTest, job_id: str) -> event_pb2.JobState.ValueType:
    return pair.client.jobs.get(job_id).state


def _refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode | None, str] | None:
    try:
        call()
    except TunesmithError as error:
        return error.code, error.reason
    return None


def _events(pair: PairUnderTest, job_id: str) -> list[event_pb2.Event]:
    return list(pair.client.jobs.events(job_id))


def _is_empty(directory: Path) -> bool:
    return not list(directory.iterdir())


def _has_succeeded(pair: PairUnderTest, job_id: str) -> bool:
    return _state(pair, job_id) == _SUCCEEDED


def _has_warned(pair: PairUnderTest, job_id: str, code: str) -> bool:
    return code in _warnings(pair, job_id)


def _warnings(pair: PairUnderTest, job_id: str) -> set[str]:
    return {event.payload.warning.code for event in _events(pair, job_id) if event.payload.HasField("warning")}


def _messages(pair: PairUnderTest, job_id: str) -> list[str]:
    """Of the job's changes of state."""
    return [event.payload.job_state.message for event in _events(pair, job_id) if event.payload.HasField("job_state")]


def _last_checkpoint(pair: PairUnderTest, job_id: str) -> int:
    steps = [
        event.payload.checkpoint.step
        for event in _events(pair, job_id)
        if event.payload.checkpoint.status == event_pb2.CHECKPOINT_STATUS_COMMITTED
    ]
    return max(steps, default=0)


def _hold_log(pair: PairUnderTest, job_id: str, ledger: Ledger) -> list[event_pb2.Event]:
    events = _events(pair, job_id)
    numbers = [event.sequence for event in events]
    ledger.hold("the job's log is 1..n without a gap or a duplicate", numbers == list(range(1, len(numbers) + 1)))
    return events


def _hold_integrity(database: Path, ledger: Ledger) -> None:
    try:
        from pysqlite3 import dbapi2 as sqlite
    except ImportError:
        import sqlite3 as sqlite
    connection = sqlite.connect(database)
    try:
        ledger.hold("the database is whole", connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])
    finally:
        connection.close()


def _checkpoints_are_whole(data: Path, job_id: str) -> bool:
    manifests = list((data / "node-local/runs" / job_id).glob("*/checkpoints/step-*/manifest.json"))
    return bool(manifests) and all(
        _is_whole(manifest.parent / file["path"], file["sha256"])
        for manifest in manifests
        for file in json.loads(manifest.read_text())["files"]
    )


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _adapter_is_whole(output: Path, job_id: str) -> bool:
    found = list(output.glob(f"*/{job_id}/adapter/adapter_model.safetensors"))
    return len(found) == 1 and found[0].stat().st_size > 0


def _stands_still(journal: Path) -> bool:
    before = journal.stat().st_size
    time.sleep(1.0)
    return journal.stat().st_size == before
