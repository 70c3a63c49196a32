"""The journal keeps what was appended, cuts only a torn tail, and refuses a second writer."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_service.journal import (
    STEPS_LOST,
    JournalDamaged,
    JournalFull,
    JournalLocked,
    Reader,
    Writer,
    events,
    file,
    summarize,
)
from tunesmith.common.v1 import event_pb2


def step(number: int) -> event_pb2.EventPayload:
    return events.wrap(event_pb2.StepEvent(step=number, total_steps=10, loss=1.5))


def state(value: event_pb2.RunState.ValueType) -> event_pb2.EventPayload:
    return events.wrap(event_pb2.RunStateEvent(state=value))


def test_appended_events_are_read_back_in_order(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "journal", 3) as writer:
        assert [writer.append(step(n)) for n in range(1, 6)] == [1, 2, 3, 4, 5]
    with Reader(tmp_path / "journal") as reader:
        records = reader.read(0)
        assert [record.run_sequence for record in records] == [1, 2, 3, 4, 5]
        event = records[3].decode()
        assert (event.attempt, event.run_sequence, event.sequence) == (3, 4, 0)
        assert event.kind == event_pb2.EVENT_KIND_STEP
        assert event_pb2.EventPayload.FromString(event.payload).step.step == 4
        assert [record.run_sequence for record in reader.read(2, limit=2)] == [3, 4]
        assert reader.read(5) == []


def test_a_reader_follows_a_writer_and_reads_back(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "journal", 1) as writer, Reader(tmp_path / "journal") as reader:
        assert reader.read(0) == []
        for number in range(1, 4):
            writer.append(step(number))
            assert [record.run_sequence for record in reader.read(number - 1)] == [number]
        assert len(reader.read(0)) == 3


@pytest.mark.parametrize("cut", range(1, 40))
def test_every_torn_tail_is_cut_and_written_over(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal"
    with Writer.open(path, 1) as writer:
        writer.append(step(1))
        whole = path.stat().st_size
        writer.append(step(2))
    os.truncate(path, min(path.stat().st_size - 1, whole + cut))
    with Reader(path) as reader:
        assert [record.run_sequence for record in reader.read(0)] == [1]
    with Writer.open(path, 1) as writer:
        assert path.stat().st_size == whole
        assert writer.append(step(7)) == 2
    with Reader(path) as reader:
        payload = event_pb2.EventPayload.FromString(reader.read(1)[0].decode().payload)
        assert payload.step.step == 7


def test_a_flipped_bit_ends_what_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Writer.open(path, 1) as writer:
        writer.append(step(1))
        second = path.stat().st_size
        writer.append(step(2))
        writer.append(step(3))
    content = bytearray(path.read_bytes())
    content[second + 20] ^= 1
    path.write_bytes(content)
    with Reader(path) as reader:
        assert [record.run_sequence for record in reader.read(0)] == [1]


def test_a_journal_that_shrank_under_its_reader_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Writer.open(path, 1) as writer:
        writer.append(step(1))
    with Reader(path) as reader:
        reader.read(0)
        os.truncate(path, 3)
        with pytest.raises(JournalDamaged):
            reader.read(1)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "journal", 1), pytest.raises(JournalLocked):
        Writer.open(tmp_path / "journal", 1)
    Writer.open(tmp_path / "journal", 1).close()


def test_a_killed_writer_leaves_every_appended_event(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from gpu_service.journal import Writer, events\n"
        "from tunesmith.common.v1 import event_pb2\n"
        "w = Writer.open(Path(sys.argv[1]), 1)\n"
        "[w.append(events.wrap(event_pb2.StepEvent(step=n))) for n in range(50)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=False)
    assert done.returncode == -9
    with Reader(path) as reader:
        assert len(reader.read(0)) == 50


def test_over_long_events_and_empty_payloads_are_refused(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "journal", 1) as writer:
        with pytest.raises(ValueError, match="over the limit"):
            writer.append(events.wrap(event_pb2.LogEvent(message="x" * file.MAX_EVENT_BYTES)))
        with pytest.raises(ValueError, match="no event"):
            writer.append(event_pb2.EventPayload())
        assert writer.append(step(1)) == 1


def test_no_room_is_a_typed_error_and_leaves_the_journal_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Writer.open(path, 1) as writer:
        writer.append(step(1))
        whole = path.stat().st_size
        writer._can_reserve = False
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # A file size limit raises EFBIG, an OSError that is not about space.
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                writer.append(step(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.stat().st_size == whole
        assert writer.append(step(2)) == 2
    assert issubclass(JournalFull, Exception)


def test_a_full_disk_leaves_room_for_the_closing_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, end: int, size: int) -> bool:
        raise OSError(28, "No space left on device")

    with Writer.open(tmp_path / "journal", 1) as writer:
        writer.append(step(1))
        monkeypatch.setattr(file, "_reserve", refuse)
        writer._reserved_end = 0
        with pytest.raises(JournalFull):
            writer.append(step(2))
        with pytest.raises(JournalFull):
            writer.append(events.wrap(event_pb2.WarningEvent(code="non-finite-loss")))
        # What a stop could not keep is said behind it, when no room may come any more.
        assert writer.append(events.wrap(event_pb2.WarningEvent(code=STEPS_LOST))) == 2
        assert writer.append(state(event_pb2.RUN_STATE_FAILED)) == 3


def test_the_reserve_does_not_change_the_size(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Writer.open(path, 1) as writer:
        writer.append(step(1))
        assert path.stat().st_size < 1000
        assert not writer._can_reserve or path.stat().st_blocks * 512 >= file.RESERVE_BYTES


def test_the_reserve_is_still_there_for_whoever_closes_the_journal(tmp_path: Path) -> None:
    """An engine that dies on a full disk leaves the reserve to its shim, which opens the journal anew."""
    path = tmp_path / "journal"
    with Writer.open(path, 1) as writer:
        writer.append(step(1))
        if not writer._can_reserve:
            pytest.skip("this file system reserves nothing")
    before = path.stat().st_blocks
    with Writer.open(path, 1):
        assert path.stat().st_blocks == before
    with path.open("ab") as torn:
        torn.write(b"half a record")
    with Writer.open(path, 1) as writer:
        assert path.stat().st_blocks * 512 >= file.RESERVE_BYTES
        assert writer.append(state(event_pb2.RUN_STATE_FAILED)) == 2


def test_a_summary_tells_state_phase_checkpoints_and_failure(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert summarize(path).state == event_pb2.RUN_STATE_ACCEPTED
    committed = event_pb2.CHECKPOINT_STATUS_COMMITTED
    with Writer.open(path, 1) as writer:
        writer.append(state(event_pb2.RUN_STATE_RUNNING))
        writer.append(events.wrap(event_pb2.PhaseEvent(phase=event_pb2.PHASE_TRAINING)))
        for number in (10, 20):
            checkpoint = event_pb2.CheckpointEvent(name=f"step-{number:08}", step=number, status=committed)
            writer.append(events.wrap(checkpoint))
        deleted = event_pb2.CheckpointEvent(name="step-00000010", status=event_pb2.CHECKPOINT_STATUS_DELETED)
        writer.append(events.wrap(deleted))
        ending = event_pb2.RunStateEvent(
            state=event_pb2.RUN_STATE_FAILED,
            failure=events.failure(reason="ENGINE_KILLED", fault="PLATFORM", message="killed", signal=9),
        )
        assert not summarize(path).is_over
        writer.append(events.wrap(ending))
    summary = summarize(path)
    assert summary.is_over
    assert summary.phase == event_pb2.PHASE_TRAINING
    assert summary.failure is not None
    assert summary.failure.signal == 9
    assert list(summary.checkpoints) == ["step-00000020"]
    assert summary.last_checkpoint is not None
    assert summary.last_checkpoint.step == 20
    assert summary.last_run_sequence == 6


def test_every_event_message_has_its_place_in_the_payload() -> None:
    for field in event_pb2.EventPayload.DESCRIPTOR.oneofs_by_name["kind"].fields:
        payload = events.wrap(getattr(event_pb2.EventPayload(), field.name))
        assert payload.WhichOneof("kind") == field.name
        assert events.kind_of(payload) == field.number
