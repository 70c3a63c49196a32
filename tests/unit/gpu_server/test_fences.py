"""What was recorded or asked for stays: an engine's end, a cancel, a journal's order, a deletion that was begun."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_service.engine import durable
from gpu_service.engine.training import retention
from gpu_service.journal import Reader, Writer, events, summarize
from gpu_service.runs.run import Run
from gpu_service.shim import durable_json
from gpu_service.shim.bury import bury
from gpu_service.shim.records import ExitRecord
from tunesmith.common.v1 import event_pb2

ENDING = ExitRecord(status=None, signal=9, phase="TRAINING", run_directory=None, stop_mode="cancel")


def test_what_a_shim_recorded_is_how_its_engine_ended(tmp_path: Path) -> None:
    """It died between its record and the journal; who buries it knows less than it did."""
    engine, run = tmp_path / "engine", tmp_path / "run"
    for directory in (engine, run):
        directory.mkdir()
    durable_json.write(run / "run.json", {"job_id": "j", "attempt": 1})
    with Writer.open(run / "journal", 1) as writer:
        writer.append(events.wrap(event_pb2.RunStateEvent(state=event_pb2.RUN_STATE_RUNNING)))
    recorded = replace(ENDING, run_directory=str(run))
    recorded.write(engine)
    bury(engine)
    assert ExitRecord.read(engine) == recorded
    assert summarize(run / "journal").state == event_pb2.RUN_STATE_CANCELLED


async def test_a_cancel_is_never_taken_back(tmp_path: Path) -> None:
    content = {
        "installation_id": "i",
        "job_id": "j",
        "attempt": 1,
        "spec_digest": "d",
        "weights_digest": "w",
        "device": {"type": "cpu", "index": -1},
    }
    run = Run(directory=tmp_path, content=content, on_change=lambda: None)
    run.note_stop("checkpoint", 60.0)
    run.note_stop("cancel", 5.0)
    run.note_stop("checkpoint", 60.0)
    assert run.stop_mode == "cancel"


def test_a_record_that_is_not_the_next_is_none(tmp_path: Path) -> None:
    """Whole records with good checksums, in another order than they were appended in."""
    path = tmp_path / "journal"
    with Writer.open(path, 1) as writer:
        for number in (1, 2):
            writer.append(events.wrap(event_pb2.StepEvent(step=number, total_steps=9)))
        first = path.read_bytes()
        writer.append(events.wrap(event_pb2.StepEvent(step=3, total_steps=9)))
    path.write_bytes(first + first)
    with Reader(path) as reader:
        assert [record.run_sequence for record in reader.read(0)] == [1, 2]
    with Writer.open(path, 1) as writer:
        assert path.stat().st_size == len(first)
        assert writer.last_sequence == 2


def test_half_a_deleted_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while it deletes one leaves nothing that looks like a checkpoint."""
    with durable.staged(tmp_path / "step-00000010") as staging:
        (staging / "weights").write_bytes(b"weights")
        durable.write_manifest(staging, {"step": 10, "best": False}, durable.list_files(staging))

    def die(directory: Path) -> None:
        os.unlink(directory / "weights")  # noqa: PTH108 - half of it
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        durable.delete(tmp_path / "step-00000010")
    assert retention.committed(tmp_path) == []
