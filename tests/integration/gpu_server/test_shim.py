"""A shim with a stub engine, without any server: what it promises about processes, records and journals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.gpu_runs import (
    ShimConnection,
    child_environment,
    has_done_step,
    is_alive,
    payloads,
    processes_of,
    summary_of,
    wait_for,
    write_engine,
    write_run,
)
from tunesmith.common.v1 import errors_pb2, event_pb2


class Shims:
    """Starts shims and ends what a failed test left."""

    def __init__(self) -> None:
        self._started: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(self, directory: Path, *flags: str) -> subprocess.Popen[bytes]:
        with (directory / "engine.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpu_service.shim", *flags, str(directory)],
                start_new_session=True,
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._started.append((process, directory))
        return process

    def end(self) -> None:
        for process, directory in self._started:
            process.kill()
            process.wait()
            for pid in processes_of(directory):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def shims() -> Iterator[Shims]:
    started = Shims()
    yield started
    started.end()


def test_a_run_is_trained_and_the_engine_stays_warm(tmp_path: Path, shims: Shims) -> None:
    engine, run = write_engine(tmp_path), write_run(tmp_path)
    shims.start(engine)
    connection = ShimConnection(engine)
    connection.send(type="start_run", run_directory=str(run))
    assert connection.receive("run_finished")["state"] == "SUCCEEDED"
    status = connection.status()
    assert (status["state"], status["run_directory"]) == ("idle", None)
    assert status["resident"]["base_model"] == "org/name"
    assert payloads(run)[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
    second = write_run(tmp_path, attempt=2)
    connection.send(type="start_run", run_directory=str(second))
    assert connection.receive("run_finished")["state"] == "SUCCEEDED"
    assert connection.status()["engine_pid"] == status["engine_pid"]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_cancel_is_said_only_when_a_frozen_engine_and_its_detached_child_are_gone(
    tmp_path: Path, shims: Shims, device_type: str
) -> None:
    engine = write_engine(tmp_path, device_type=device_type)
    run = write_run(
        tmp_path,
        num_steps=100_000,
        script={"freeze_at": 3, "spawn_setsid_child": True, "ignore_stop": True, "ballast_bytes": 30_000_000},
    )
    shim = shims.start(engine)
    connection = ShimConnection(engine)
    connection.send(type="start_run", run_directory=str(run))
    wait_for(lambda: has_done_step(run, 2))
    # Engine and the sleeper in a session of its own.
    assert len(wait_for(lambda: len(found := processes_of(engine)) >= 2 and found)) >= 2
    connection.send(type="stop_run", run_directory=str(run), mode="cancel", grace_seconds=0.2)
    wait_for(lambda: summary_of(run).is_over)
    assert processes_of(engine) == []
    *_, memory, last = payloads(run)
    assert last.run_state.state == event_pb2.RUN_STATE_CANCELLED
    assert memory.memory_released.engine_ended
    assert memory.memory_released.resident_bytes == 0
    if device_type == "cpu":
        assert memory.memory_released.freed_bytes > 30_000_000
    else:
        # Host memory is not what a GPU's run is asked about, and the device's cannot be measured here.
        assert memory.memory_released.freed_bytes == 0
    assert connection.receive("engine_exited")["signal"] == signal.SIGKILL
    assert shim.wait(60) == 0
    record = json.loads((engine / "exit.json").read_text())
    assert (record["signal"], record["stop_mode"], record["phase"]) == (9, "cancel", "TRAINING")
    lines = (engine / "engine.log").read_text().splitlines()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    killed = next(line for line in logged if line["event"] == "shim-grace-over")
    assert (killed["job_id"], killed["run_directory"]) == ("01JOB", str(run))


@pytest.mark.parametrize("ending", ["fail_after", "exit_after"])
def test_a_generation_that_takes_the_engine_with_it_costs_the_run_behind_it_nothing(
    tmp_path: Path, shims: Shims, ending: str
) -> None:
    engine, run = write_engine(tmp_path), write_run(tmp_path)
    shims.start(engine)
    connection = ShimConnection(engine)
    wait_for(lambda: connection.status()["state"] == "idle")
    request = tmp_path / "request.json"
    asked = {"base_model": "org/name", "weights_digest": "w", "adapter_directory": None}
    request.write_text(json.dumps({**asked, "messages": [{"content": json.dumps({ending: 0})}]}))
    # The run arrives before the engine is seen to end.
    engine_pid = connection.status()["engine_pid"]
    os.kill(engine_pid, signal.SIGSTOP)
    connection.send(type="generate", generation="g", request=str(request))
    connection.send(type="start_run", run_directory=str(run))
    assert connection.status()["run_directory"] == str(run)
    os.kill(engine_pid, signal.SIGCONT)
    wait_for(lambda: summary_of(run).is_over)
    assert payloads(run)[-1].run_state.state == event_pb2.RUN_STATE_INTERRUPTED


@pytest.mark.parametrize(
    ("save_every_steps", "expected"), [(0, event_pb2.RUN_STATE_FAILED), (1, event_pb2.RUN_STATE_INTERRUPTED)]
)
def test_a_checkpoint_stop_that_is_not_obeyed_is_interrupted_only_with_a_checkpoint(
    tmp_path: Path, shims: Shims, save_every_steps: int, expected: event_pb2.RunState.ValueType
) -> None:
    engine = write_engine(tmp_path)
    script = {"freeze_at": 3, "ignore_stop": True}
    run = write_run(tmp_path, num_steps=10, save_every_steps=save_every_steps, script=script)
    shims.start(engine)
    connection = ShimConnection(engine)
    connection.send(type="start_run", run_directory=str(run))
    wait_for(lambda: has_done_step(run, 2))
    connection.send(type="stop_run", run_directory=str(run), mode="checkpoint", grace_seconds=0.1)
    wait_for(lambda: summary_of(run).is_over)
    assert summary_of(run).state == expected


@pytest.mark.parametrize(
    ("script", "kill", "reason", "status", "signal_number"),
    [
        ({"exit_at_step": 2, "exit_code": 7}, False, errors_pb2.ERROR_REASON_ENGINE_EXITED, 7, None),
        ({"hold_at": 2, "until_file": "/nowhere"}, True, errors_pb2.ERROR_REASON_ENGINE_KILLED, None, 9),
    ],
)
def test_an_engine_that_ends_without_a_word_gives_a_typed_failure(
    tmp_path: Path,
    shims: Shims,
    script: dict[str, object],
    kill: bool,
    reason: errors_pb2.ErrorReason.ValueType,
    status: int | None,
    signal_number: int | None,
) -> None:
    engine, run = write_engine(tmp_path), write_run(tmp_path, script=script)
    shims.start(engine)
    connection = ShimConnection(engine)
    engine_pid = connection.status()["engine_pid"]
    connection.send(type="start_run", run_directory=str(run))
    if kill:
        while connection.receive("phase")["phase"] != "TRAINING":
            pass
        os.kill(engine_pid, signal.SIGKILL)
    ended = connection.receive("engine_exited")
    assert (ended["status"], ended["signal"]) == (status, signal_number)
    last = payloads(run)[-1].run_state
    assert last.state == event_pb2.RUN_STATE_FAILED
    assert (last.failure.reason, last.failure.stage) == (reason, "TRAINING")
    assert (last.failure.exit_status, last.failure.signal) == (status or 0, signal_number or 0)


def test_an_orphan_checkpoints_and_leaves(tmp_path: Path, shims: Shims) -> None:
    engine, run = write_engine(tmp_path, orphan_limit_seconds=0.5), write_run(tmp_path, num_steps=1_000_000)
    shim = shims.start(engine)
    connection = ShimConnection(engine)
    connection.send(type="start_run", run_directory=str(run))
    connection.receive("journal")
    connection.close()
    assert shim.wait(60) == 0
    summary = summary_of(run)
    assert summary.state == event_pb2.RUN_STATE_INTERRUPTED
    assert summary.last_checkpoint is not None or summary.phase != event_pb2.PHASE_TRAINING
    assert processes_of(engine) == []


def test_a_second_shim_refuses_and_leaves_the_first_unharmed(tmp_path: Path, shims: Shims) -> None:
    engine = write_engine(tmp_path)
    shims.start(engine)
    connection = ShimConnection(engine)
    before = connection.status()
    assert shims.start(engine).wait(60) == 3
    assert shims.start(engine, "--bury").wait(60) == 3
    assert connection.status()["engine_pid"] == before["engine_pid"]


@pytest.mark.parametrize("engine_too", [True, False])
def test_a_lost_shim_is_buried(tmp_path: Path, shims: Shims, engine_too: bool) -> None:
    engine = write_engine(tmp_path)
    run = write_run(tmp_path, num_steps=1_000_000, script={"survive_shim": True, "spawn_setsid_child": True})
    shim = shims.start(engine)
    connection = ShimConnection(engine)
    engine_pid = connection.status()["engine_pid"]
    connection.send(type="start_run", run_directory=str(run))
    while connection.receive("phase")["phase"] != "TRAINING":
        pass
    os.kill(shim.pid, signal.SIGKILL)
    shim.wait(60)
    if engine_too:
        os.kill(engine_pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(engine_pid))
        # What the kernel left of a record that was being written.
        with (run / "journal").open("ab") as journal:
            journal.write(b"\x40\0\0\0torn")
    assert not summary_of(run).is_over
    assert shims.start(engine, "--bury").wait(60) == 0
    assert processes_of(engine) == []
    last = payloads(run)[-1].run_state
    assert last.failure.reason == errors_pb2.ERROR_REASON_ENGINE_LOST
    assert shims.start(engine, "--bury").wait(60) == 0
    assert payloads(run)[-1].run_state == last


def test_a_generation_is_no_run(shims: Shims, tmp_path: Path) -> None:
    """It leaves the state, the record and every journal alone; a run ends it, and while that goes on there is none."""
    engine = write_engine(tmp_path)
    shims.start(engine)
    server = ShimConnection(engine)
    content: dict[str, Any] = {"base_model": "org/name", "weights_digest": "w", "adapter_directory": None}
    content |= {"messages": [{"role": "user", "content": json.dumps({"endless": True})}]}
    request = tmp_path / "request.json"
    request.write_text(json.dumps(content))
    server.status()
    record = (engine / "shim.json").read_bytes()
    server.send(type="generate", generation="g", request=str(request))
    assert server.receive("generated")["text"] == "word "
    status = server.status()
    assert (status["state"], status["run_directory"]) == ("idle", None)
    assert (engine / "shim.json").read_bytes() == record

    directory = write_run(tmp_path, script={"hold_at": "TRAINING", "until_file": str(tmp_path / "go")})
    server.send(type="start_run", run_directory=str(directory))
    while not (ended := server.receive("generated")).get("done"):
        pass
    assert "finish_reason" not in ended
    wait_for(lambda: summary_of(directory).last_run_sequence)
    server.send(type="generate", generation="later", request=str(request))
    refused = server.receive("generated")
    assert (refused["generation"], refused["failure"]["reason"]) == ("later", "NODE_BUSY")
    (tmp_path / "go").touch()
    assert server.receive("run_finished")["state"] == "SUCCEEDED"
    server.close()
