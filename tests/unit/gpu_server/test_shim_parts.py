"""The shim's parts by themselves: lines, stops, endings, records, locks, and reading /proc."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_service.journal import JournalLocked, Writer, events, summarize
from gpu_service.shim import durable_json, process_tree
from gpu_service.shim.closing import close_run
from gpu_service.shim.configuration import EngineConfiguration, EngineDirectoryInvalid
from gpu_service.shim.lock import AlreadyHeld, hold, is_held
from gpu_service.shim.protocol import MAX_LINE_BYTES, Channel, LineSplitter, ProtocolBroken, encode
from gpu_service.shim.records import ExitRecord
from gpu_service.shim.stop import Stop
from tests.fakes.gpu_runs import payloads, write_run
from tunesmith.common.v1 import errors_pb2, event_pb2

ENDING = ExitRecord(status=None, signal=None, phase="", run_directory=None, stop_mode=None)


def test_lines_are_found_however_they_are_cut() -> None:
    messages = [{"type": "status"}, {"type": "phase", "phase": "TRAINING"}]
    stream = b"".join(encode(message) for message in messages)
    for cut in range(len(stream)):
        splitter = LineSplitter()
        assert splitter.feed(stream[:cut]) + splitter.feed(stream[cut:]) == messages


@pytest.mark.parametrize("line", [b"\n", b"nonsense\n", b"[1]\n", b'{"no": "type"}\n', b"x" * (MAX_LINE_BYTES + 1)])
def test_what_is_no_message_breaks_the_protocol(line: bytes) -> None:
    with pytest.raises(ProtocolBroken):
        LineSplitter().feed(line)


def fill(channel: Channel) -> None:
    for _ in range(100):
        channel.send({"type": "notice", "text": "x" * 100_000})


def test_a_peer_that_does_not_read_is_given_up_and_never_waited_for() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours)
        for _ in range(41):
            channel.send({"type": "notice", "text": "x" * 100_000})
        assert channel.has_unsent
        with pytest.raises(ProtocolBroken, match="does not read"):
            fill(channel)
        channel.close()


def test_a_stop_is_only_ever_tightened() -> None:
    stop = Stop(mode="checkpoint", grace_seconds=100)
    first = stop.deadline
    assert not stop.tighten(mode="checkpoint", grace_seconds=1000)
    assert stop.deadline == first
    assert stop.tighten(mode="cancel", grace_seconds=1)
    assert stop.deadline < first
    assert not stop.tighten(mode="checkpoint", grace_seconds=1)
    assert stop.mode == "cancel"
    stop.measure(500)
    stop.measure(300)
    assert (stop.freed_bytes(100), stop.freed_bytes(600)) == (400, 0)


def begun(tmp_path: Path, *, checkpoint: bool = False) -> Path:
    directory = write_run(tmp_path)
    with Writer.open(directory / "journal", 1) as writer:
        writer.append(events.wrap(event_pb2.RunStateEvent(state=event_pb2.RUN_STATE_RUNNING)))
        writer.append(events.wrap(event_pb2.PhaseEvent(phase=event_pb2.PHASE_TRAINING)))
        if checkpoint:
            writer.append(events.wrap(event_pb2.CheckpointEvent(name="step-00000001", step=1)))
    return directory


@pytest.mark.parametrize(
    ("ending", "checkpoint", "state", "reason"),
    [
        ({"signal": 9}, False, event_pb2.RUN_STATE_FAILED, errors_pb2.ERROR_REASON_ENGINE_KILLED),
        ({"signal": 11}, True, event_pb2.RUN_STATE_FAILED, errors_pb2.ERROR_REASON_ENGINE_KILLED),
        ({"status": 0}, False, event_pb2.RUN_STATE_FAILED, errors_pb2.ERROR_REASON_ENGINE_EXITED),
        ({}, True, event_pb2.RUN_STATE_FAILED, errors_pb2.ERROR_REASON_ENGINE_LOST),
        (
            {"signal": 9, "out_of_memory": True},
            False,
            event_pb2.RUN_STATE_FAILED,
            errors_pb2.ERROR_REASON_HOST_OUT_OF_MEMORY,
        ),
        ({"signal": 9, "stop_mode": "cancel"}, False, event_pb2.RUN_STATE_CANCELLED, 0),
        ({"status": 0, "stop_mode": "checkpoint"}, True, event_pb2.RUN_STATE_INTERRUPTED, 0),
        (
            {"signal": 9, "stop_mode": "checkpoint"},
            False,
            event_pb2.RUN_STATE_FAILED,
            errors_pb2.ERROR_REASON_ENGINE_KILLED,
        ),
    ],
)
def test_an_engines_end_becomes_one_terminal_event(
    tmp_path: Path,
    ending: dict[str, object],
    checkpoint: bool,
    state: event_pb2.RunState.ValueType,
    reason: errors_pb2.ErrorReason.ValueType,
) -> None:
    directory = begun(tmp_path, checkpoint=checkpoint)
    record = replace(ENDING, **ending)  # type: ignore[arg-type]
    assert close_run(directory, record) is not None
    last = payloads(directory)[-1].run_state
    assert (last.previous_state, last.state, last.failure.reason) == (event_pb2.RUN_STATE_RUNNING, state, reason)
    if reason:
        assert last.failure.stage == "TRAINING"
    lost = [payload.warning.message for payload in payloads(directory) if payload.warning.code == "steps-lost"]
    assert [message.endswith("what was trained after step 1 is lost") for message in lost] == (
        [True] if state == event_pb2.RUN_STATE_INTERRUPTED else []
    )
    has_memory = any(payload.HasField("memory_released") for payload in payloads(directory))
    assert has_memory == (record.stop_mode is not None)
    # What was recorded is the outcome: another end changes nothing.
    before = payloads(directory)
    assert close_run(directory, replace(ENDING, signal=15)) is None
    assert payloads(directory) == before


def test_a_run_that_never_began_is_interrupted_by_a_checkpoint_stop(tmp_path: Path) -> None:
    directory = write_run(tmp_path)
    close_run(directory, replace(ENDING, stop_mode="checkpoint"))
    assert summarize(directory / "journal").state == event_pb2.RUN_STATE_INTERRUPTED


def test_a_journal_that_is_being_written_is_not_closed(tmp_path: Path) -> None:
    directory = write_run(tmp_path)
    program = (
        "import sys; from pathlib import Path; from gpu_service.journal import Writer;"
        "writer = Writer.open(Path(sys.argv[1]), 1); print('open', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory / "journal")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as writing:
        assert writing.stdout is not None
        assert writing.stdout.readline() == b"open\n"
        with pytest.raises(JournalLocked):
            close_run(directory, replace(ENDING, signal=9))
        writing.kill()


def test_records_are_read_as_written_and_whole(tmp_path: Path) -> None:
    record = replace(ENDING, signal=9, phase="TRAINING", run_directory="/run", freed_bytes=5)
    assert ExitRecord.read(tmp_path) is None
    record.write(tmp_path)
    assert ExitRecord.read(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]
    (tmp_path / "exit.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        durable_json.read(tmp_path / "exit.json")


def test_an_engine_directory_says_all_or_is_refused(tmp_path: Path) -> None:
    configuration = EngineConfiguration(
        argv=("python", "-m", "engine"),
        environment={"A": "b"},
        device={"type": "cpu", "index": -1},
        orphan_limit_seconds=10,
        grace_seconds=3,
        hang_limit_seconds=40,
        device_memory_command=("ask", "0"),
        device_memory_bytes=5,
    )
    with pytest.raises(EngineDirectoryInvalid, match=r"no engine\.json"):
        EngineConfiguration.read(tmp_path)
    configuration.write(tmp_path)
    assert EngineConfiguration.read(tmp_path) == configuration
    content = json.loads((tmp_path / "engine.json").read_text())
    # One of an earlier version does not say what the device held.
    for name in content.keys() - {"device_memory"}:
        (tmp_path / "engine.json").write_text(json.dumps({key: value for key, value in content.items() if key != name}))
        with pytest.raises(EngineDirectoryInvalid, match=name):
            EngineConfiguration.read(tmp_path)


def test_a_lock_is_held_by_one_and_freed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    with hold(path):
        assert is_held(path)
        with pytest.raises(AlreadyHeld), hold(path):
            pass
        assert is_held(path)
    assert not is_held(path)


def test_proc_is_read_for_names_with_parentheses_and_the_dead(tmp_path: Path) -> None:
    odd = tmp_path / "odd) (name"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "60"], start_new_session=True) as child:
        found = process_tree.facts(child.pid)
        assert found is not None
        assert (found.parent_pid, found.session) == (os.getpid(), child.pid)
        assert child.pid in process_tree.children(os.getpid())
        assert child.pid in process_tree.tree(os.getpid())
        assert process_tree.resident_bytes([child.pid]) > 0
        child.kill()
    assert process_tree.facts(child.pid) is None
    assert process_tree.resident_bytes([child.pid]) == 0


def test_processes_are_found_by_the_mark_in_their_environment() -> None:
    mark = f"mark-{os.getpid()}"
    with subprocess.Popen(["/bin/sleep", "60"], env={"TUNESMITH_TEST": mark}) as child:
        while process_tree.with_environment("TUNESMITH_TEST", mark) != [child.pid]:
            assert child.poll() is None
        assert process_tree.with_environment("TUNESMITH_TEST", mark + "x") == []
        assert process_tree.kill_with_environment("TUNESMITH_TEST", mark) == [child.pid]
        assert child.wait(60) == -9
