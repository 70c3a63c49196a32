"""What is tried on the full disk of a node: what a run writes from its start to its artifacts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.fakes.pair import running_pair
from tests.fakes.tiny_models import place
from tests.faults.full_disk import Ledger, Volume
from tests.faults.full_disk_looks import (
    SUCCEEDED,
    adapter_is_whole,
    checkpoints_are_whole,
    hold_integrity,
    hold_log,
    last_checkpoint,
    messages_of,
    pids_of,
    stands_still,
    state_of,
    stub_pair,
    warnings_of,
)
from tunesmith.common.v1 import event_pb2, training_spec_pb2

_MEBIBYTE = 1024**2


def _save(directory: Path, ledger: Ledger) -> None:
    """The node's disk has no room for a checkpoint: it is left out and said, and training goes on."""
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=48 * _MEBIBYTE)
    with stub_pair(directory) as pair:
        pids = pids_of(pair)
        full = directory / "full"
        script = {"hold_at": 12, "until_file": str(full), "step_seconds": 0.1}
        job = pair.start("trains", num_steps=40, save_every_steps=5, script=script)
        pair.wait_for_step(job.job_id, 11)
        with volume.full():
            full.touch()
            ledger.comes_true(
                "the log says that a checkpoint was left out",
                lambda: "checkpoint-failed" in warnings_of(pair, job.job_id),
            )
            ledger.hold("earlier checkpoints are whole", checkpoints_are_whole(data, job.job_id))
        ledger.comes_true("a later save succeeds", lambda: last_checkpoint(pair, job.job_id) > 15)
        ledger.comes_true("the job ends well", lambda: state_of(pair, job.job_id) == SUCCEEDED)
        ledger.hold("it needed one attempt", pair.client.jobs.get(job.job_id).attempt == 1)
        hold_log(pair, job.job_id, ledger)
        ledger.hold("no service was restarted", pids_of(pair) == pids)
    hold_integrity(data / "control/control.sqlite", ledger)


def _start(directory: Path, ledger: Ledger) -> None:
    """The node's disk has no room for what a run would leave: the run waits in the queue until there is."""
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=48 * _MEBIBYTE)
    with stub_pair(directory) as pair:
        pids = pids_of(pair)
        waiting = pair.project("waits")
        with volume.full():
            queued = pair.client.jobs.start(waiting.project_id)
            ledger.comes_true(
                "a run for which the node has no room waits, and says why",
                lambda: any("DISK_FULL" in text for text in messages_of(pair, queued.job_id)),
            )
            ledger.hold(
                "it is no failed attempt", not any("retry" in text for text in messages_of(pair, queued.job_id))
            )
        ledger.comes_true("the one that waited ends well", lambda: state_of(pair, queued.job_id) == SUCCEEDED)
        hold_log(pair, queued.job_id, ledger)
        # Room for its data, and not for a checkpoint and the artifacts.
        small = pair.project("small")
        volume.fill(leave_bytes=_MEBIBYTE)
        try:
            queued = pair.client.jobs.start(small.project_id)
            ledger.comes_true(
                "a node tells how much a run needs and how much is free",
                lambda: any("bytes; " in text for text in messages_of(pair, queued.job_id)),
            )
        finally:
            volume.empty()
        ledger.comes_true("it ends well", lambda: state_of(pair, queued.job_id) == SUCCEEDED)
        ledger.hold("no service was restarted", pids_of(pair) == pids)
    hold_integrity(data / "control/control.sqlite", ledger)


def _journal(directory: Path, ledger: Ledger) -> None:
    """The journal has no room for further events: training stands still, and nothing is lost or told twice."""
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=48 * _MEBIBYTE)
    num_steps = 20_000
    with stub_pair(directory) as pair:
        pids = pids_of(pair)
        # It writes faster than it is looked at, and goes on once there is no room beside what is allotted.
        full = directory / "full"
        script = {"hold_at": 10, "until_file": str(full), "step_seconds": 0}
        job = pair.start("writes", num_steps=num_steps, script=script)
        pair.wait_for_step(job.job_id, 9)
        journal = data / "node-local/runs" / job.job_id / "1/journal"
        with volume.full():
            held = journal.stat().st_size
            full.touch()
            ledger.comes_true(
                "training stands still when its events find no room",
                lambda: journal.stat().st_size > held and stands_still(journal),
            )
            ledger.hold("the job is not over", state_of(pair, job.job_id) == event_pb2.JOB_STATE_RUNNING)
        ledger.comes_true("the job ends well", lambda: state_of(pair, job.job_id) == SUCCEEDED)
        events = hold_log(pair, job.job_id, ledger)
        steps = [event.payload.step.step for event in events if event.payload.HasField("step")]
        ledger.hold("every step is told once", steps == list(range(1, num_steps + 1)))
        ledger.hold("no service was restarted", pids_of(pair) == pids)


def _cancel(directory: Path, ledger: Ledger) -> None:
    """A run on a full disk can be cancelled: its closing events have room of their own."""
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=48 * _MEBIBYTE)
    with stub_pair(directory) as pair:
        pids = pids_of(pair)
        job = pair.start("stopped", num_steps=1_000_000, script={"step_seconds": 0.01})
        pair.wait_for_step(job.job_id, 5)
        with volume.full():
            pair.client.jobs.cancel(job.job_id)
            ledger.comes_true(
                "a cancel is carried out on a full disk",
                lambda: state_of(pair, job.job_id) == event_pb2.JOB_STATE_CANCELLED,
            )
            hold_log(pair, job.job_id, ledger)
        after = pair.start("after", num_steps=3)
        ledger.comes_true("new work is done", lambda: state_of(pair, after.job_id) == SUCCEEDED)
        ledger.hold("no service was restarted", pids_of(pair) == pids)


def _killed(directory: Path, ledger: Ledger) -> None:
    """An engine that dies on a full disk: its end is named, and the next attempt waits for room."""
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=48 * _MEBIBYTE)
    with stub_pair(directory) as pair:
        pids = pids_of(pair)
        job = pair.start("dies", num_steps=60, save_every_steps=5, script={"step_seconds": 0.1})
        pair.wait_for_step(job.job_id, 6)
        with volume.full():
            pair.kill_engine()
            ledger.comes_true(
                "the attempt's end is named", lambda: "ENGINE_KILLED" in " ".join(messages_of(pair, job.job_id))
            )
        ledger.comes_true("the job ends well", lambda: state_of(pair, job.job_id) == SUCCEEDED)
        ledger.hold("no service was restarted", pids_of(pair) == pids)
        hold_log(pair, job.job_id, ledger)


def _training(directory: Path, ledger: Ledger) -> None:
    """Real training: a save without room is left out, the next one succeeds; artifacts without room are tried again."""
    os.environ |= {"OMP_NUM_THREADS": "1"}
    os.environ.pop("TUNESMITH_GPU_ENGINE_COMMAND", None)
    data = directory / "data"
    volume = Volume(data / "node-local", size_bytes=64 * _MEBIBYTE)
    base_model = place(directory / "models")
    with running_pair(directory / "data", directory / "models", base_model) as pair:
        pids = pids_of(pair)
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
                lambda: "checkpoint-failed" in warnings_of(pair, job.job_id),
            )
            left_out = pair.client.jobs.get(job.job_id).progress.step
            ledger.hold("earlier checkpoints are whole", checkpoints_are_whole(data, job.job_id))
        ledger.comes_true("a later save succeeds", lambda: last_checkpoint(pair, job.job_id) > left_out)
        pair.wait_for_step(job.job_id, 130)
        volume.fill()
        try:
            ledger.comes_true(
                "artifacts that find no room are a typed failure, tried again",
                lambda: any("retry after DISK_FULL" in text for text in messages_of(pair, job.job_id)),
            )
            ledger.comes_true(
                "the next attempt waits for room",
                lambda: any(text.startswith("node local: DISK_FULL") for text in messages_of(pair, job.job_id)),
            )
            ledger.hold("checkpoints are whole", checkpoints_are_whole(data, job.job_id))
        finally:
            volume.empty()
        ledger.comes_true("the job ends well", lambda: state_of(pair, job.job_id) == SUCCEEDED)
        events = hold_log(pair, job.job_id, ledger)
        resumed = [event.payload.resumed.from_step for event in events if event.payload.HasField("resumed")]
        ledger.hold(f"it went on from a checkpoint, not from {resumed}", resumed and resumed[0] >= 120)
        ledger.hold("its adapter is whole", adapter_is_whole(data / "control/output", job.job_id))
        ledger.hold("no service was restarted", pids_of(pair) == pids)
    hold_integrity(data / "control/control.sqlite", ledger)


TRIALS: Mapping[str, Callable[[Path, Ledger], None]] = {
    "save": _save,
    "start": _start,
    "journal": _journal,
    "cancel": _cancel,
    "killed": _killed,
    "training": _training,
}
