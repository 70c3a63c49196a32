"""What is tried on full disks of control: its database, its bytes, and where a backup goes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import grpc

from tests.faults.full_disk import Ledger, Volume
from tests.faults.full_disk_looks import (
    SUCCEEDED,
    adapter_is_whole,
    has_succeeded,
    has_warned,
    hold_integrity,
    hold_log,
    is_empty,
    is_ready,
    pids_of,
    refusal_of,
    state_of,
    stub_pair,
)
from tunesmith.common.v1 import event_pb2

_MEBIBYTE = 1024**2


def _database(directory: Path, ledger: Ledger) -> None:
    """Control's database and its log have no room: calls say so, what is acknowledged stays, and it heals alone."""
    data = directory / "data"
    volume = Volume(data / "control", size_bytes=12 * _MEBIBYTE)
    for name in ("blobs", "output"):
        Volume(data / "control" / name, size_bytes=32 * _MEBIBYTE)
    with stub_pair(directory) as pair:
        pids = pids_of(pair)
        held = directory / "go"
        job = pair.start("held", num_steps=30, script={"hold_at": 10, "until_file": str(held)})
        pair.wait_for_step(job.job_id, 9)
        project = pair.project("second")
        with volume.full():
            refusals = [error for n in range(60) if (error := refusal_of(partial(pair.project, f"more-{n}")))]
            ledger.hold("a call that finds no room in the database is refused", refusals)
            ledger.hold(
                f"the refusal is RESOURCE_EXHAUSTED with DISK_FULL, not {refusals[:1]}",
                all(refusal == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL") for refusal in refusals),
            )
            ledger.comes_true("readiness says so", lambda: not is_ready(pair))
            ledger.hold("the process is alive all the same", is_ready(pair, service="liveness"))
            ledger.hold("reads are answered", pair.client.jobs.get(job.job_id).job_id == job.job_id)
            held.touch()
            # The run ends on its node meanwhile.
            run = data / "node-local/runs" / job.job_id / "1/artifacts/manifest.json"
            ledger.comes_true("the run goes on while control cannot write", run.exists)
        ledger.comes_true("readiness comes back alone", lambda: is_ready(pair))
        ledger.comes_true("the job ends well once there is room", lambda: state_of(pair, job.job_id) == SUCCEEDED)
        hold_log(pair, job.job_id, ledger)
        later = pair.client.jobs.start(project.project_id)
        ledger.comes_true("new work is taken", lambda: state_of(pair, later.job_id) == SUCCEEDED)
        ledger.hold("no service was restarted", pids_of(pair) == pids)
    hold_integrity(data / "control/control.sqlite", ledger)


def _blobs(directory: Path, ledger: Ledger) -> None:
    """Control's store of bytes has no room: uploads are refused whole, and a job waits with its artifacts."""
    data = directory / "data"
    volume = Volume(data / "control/blobs", size_bytes=16 * _MEBIBYTE)
    output = Volume(data / "control/output", size_bytes=16 * _MEBIBYTE)
    with stub_pair(directory) as pair:
        pids = pids_of(pair)
        for name, full in (("blobs", volume), ("output", output)):
            held = directory / f"go-{name}"
            job = pair.start(name, num_steps=4, script={"hold_at": 2, "until_file": str(held)})
            pair.wait_for_step(job.job_id, 1)
            with full.full():
                if full is volume:
                    refusal = refusal_of(lambda: pair.project("refused"))
                    expected = (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
                    ledger.hold(f"an upload is refused with DISK_FULL, not {refusal}", refusal == expected)
                    staging = data / "control/blobs/staging"
                    ledger.comes_true("nothing of it stays", partial(is_empty, staging))
                held.touch()
                ledger.comes_true(
                    f"the log says that the artifacts wait for room ({name})",
                    partial(has_warned, pair, job.job_id, "collecting-waits-for-room"),
                )
                ledger.hold("the job is not over", state_of(pair, job.job_id) == event_pb2.JOB_STATE_RUNNING)
            ledger.comes_true(
                f"the job ends well once there is room ({name})",
                partial(has_succeeded, pair, job.job_id),
            )
            hold_log(pair, job.job_id, ledger)
            ledger.hold("its adapter is whole", adapter_is_whole(data / "control/output", job.job_id))
        ledger.hold("no service was restarted", pids_of(pair) == pids)
    hold_integrity(data / "control/control.sqlite", ledger)


def _backup(directory: Path, ledger: Ledger) -> None:
    """Where a backup goes there is no room: it says so, leaves nothing, and an earlier backup is as it was."""
    data, volume = directory / "data", Volume(directory / "backups", size_bytes=24 * _MEBIBYTE)
    with stub_pair(directory) as pair:
        pids = pids_of(pair)
        job = pair.start("first", num_steps=3)
        ledger.comes_true("the job ends well", partial(has_succeeded, pair, job.job_id))
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
        ledger.comes_true("the later job ends well", partial(has_succeeded, pair, later.job_id))
        with volume.full():
            status, _ = _chore("backup", "--data-directory", data / "control", "--to", kept)
        ledger.hold("the earlier backup is not renewed without room", status == 1)
        after = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
        ledger.hold("the earlier backup is as it was", before == after)
        restored = directory / "restored"
        status, words = _chore("restore", "--from", kept, "--data-directory", restored)
        ledger.hold(f"it can be put back: {words}", status == 0)
        ledger.hold("no service was restarted", pids_of(pair) == pids)


def _chore(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "control_service", *(str(argument) for argument in arguments)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True)
    return ended.returncode, ended.stdout


TRIALS: Mapping[str, Callable[[Path, Ledger], None]] = {"database": _database, "blobs": _blobs, "backup": _backup}
