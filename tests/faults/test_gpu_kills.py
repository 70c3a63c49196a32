"""Kills parts of the GPU service while a run goes on, and holds what it promises then."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.gpu_runs import WAIT_SECONDS, is_alive, payloads, summary_of, wait_for
from tests.fakes.gpu_server import GpuServer
from tunesmith.common.v1 import errors_pb2, event_pb2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GpuServer]:
    """Started; whatever it left is ended afterwards."""
    made = GpuServer(tmp_path)
    try:
        yield made.start()
    finally:
        made.clean_up()


def test_the_servers_death_does_not_stop_training_and_its_successor_adopts(server: GpuServer, tmp_path: Path) -> None:
    go = tmp_path / "go"
    server.start_run(num_steps=40, save_every_steps=10, script={"hold_at": 30, "until_file": str(go)})
    server.wait_for_step(3)
    [before] = server.shims()
    server.kill()
    reached = summary_of(server.run_directory()).last_run_sequence
    wait_for(lambda: summary_of(server.run_directory()).last_run_sequence > reached, what="training without a server")
    server.start()
    [after] = server.shims()
    assert (after["shim_pid"], after["engine_pid"]) == (before["shim_pid"], before["engine_pid"])
    run = server.get_run()
    assert run.state == event_pb2.RUN_STATE_RUNNING
    go.touch()
    events = server.watch_to_end()
    assert [payload.step.step for payload in events if payload.HasField("step")] == list(range(1, 41))
    assert events[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
    # The engine is the new server's now: the next run is started on it.
    server.start_run("01NEXT")
    server.watch_to_end("01NEXT")
    assert [shim["engine_pid"] for shim in server.shims()] == [before["engine_pid"]]


def test_a_run_that_ends_while_no_server_lives_is_told_as_it_ended(server: GpuServer) -> None:
    server.start_run(num_steps=50)
    server.wait_for_step(1)
    server.kill()
    wait_for(lambda: summary_of(server.run_directory()).is_over)
    server.start()
    assert server.get_run().state == event_pb2.RUN_STATE_SUCCEEDED
    assert server.watch_to_end()[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED


@pytest.mark.parametrize("with_server", [True, False])
def test_a_killed_engine_is_a_typed_failure_and_is_never_reused(server: GpuServer, with_server: bool) -> None:
    server.start_run(num_steps=100_000)
    server.wait_for_step(2)
    [shim] = server.shims()
    if not with_server:
        server.kill()
    os.kill(shim["engine_pid"], signal.SIGKILL)
    wait_for(lambda: summary_of(server.run_directory()).is_over)
    if not with_server:
        server.start()
    last = server.watch_to_end()[-1].run_state
    assert last.state == event_pb2.RUN_STATE_FAILED
    assert last.failure.reason == errors_pb2.ERROR_REASON_ENGINE_KILLED
    assert last.failure.signal == signal.SIGKILL
    assert last.failure.stage == "TRAINING"
    server.start_run(attempt=2)
    assert server.watch_to_end(attempt=2)[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
    assert server.shims()[0]["engine_pid"] != shim["engine_pid"]


def test_an_engine_that_leaves_says_its_status(server: GpuServer) -> None:
    server.start_run(script={"exit_at_step": 2, "exit_code": 7})
    failure = server.watch_to_end()[-1].run_state.failure
    assert (failure.reason, failure.exit_status) == (errors_pb2.ERROR_REASON_ENGINE_EXITED, 7)


@pytest.mark.parametrize("with_server", [True, False])
@pytest.mark.parametrize("engine_too", [True, False])
def test_a_lost_shim_is_buried_with_all_that_is_left(server: GpuServer, with_server: bool, engine_too: bool) -> None:
    server.start_run(num_steps=100_000, script={"survive_shim": True, "spawn_setsid_child": True})
    server.wait_for_step(2)
    [shim] = server.shims()
    if not with_server:
        server.kill()
    if engine_too:
        # Stopped first, so that the shim does not see its engine's end.
        os.kill(shim["shim_pid"], signal.SIGSTOP)
        os.kill(shim["engine_pid"], signal.SIGKILL)
        wait_for(lambda: not is_alive(shim["engine_pid"]))
        with (server.run_directory() / "journal").open("ab") as journal:
            journal.write(b"\x40\0\0\0torn")
    os.kill(shim["shim_pid"], signal.SIGKILL)
    if not with_server:
        server.start()
    events = server.watch_to_end()
    assert events[-1].run_state.failure.reason == errors_pb2.ERROR_REASON_ENGINE_LOST
    assert server.living_processes() == []
    assert payloads(server.run_directory()) == events
    server.start_run(attempt=2)
    assert server.watch_to_end(attempt=2)[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED


def test_an_engine_that_cannot_start_fails_the_run_with_its_log(tmp_path: Path) -> None:
    server = GpuServer(tmp_path)
    server.engine_command = ("/nowhere/python",)
    try:
        server.start()
        server.start_run()
        failure = server.watch_to_end()[-1].run_state.failure
        assert failure.reason in (errors_pb2.ERROR_REASON_ENGINE_LOST, errors_pb2.ERROR_REASON_ENGINE_EXITED)
        assert "/nowhere/python" in failure.message
    finally:
        server.clean_up()


@pytest.mark.parametrize("same", ["directory", "port"])
def test_a_twin_refuses_to_start_and_leaves_the_first_unharmed(server: GpuServer, tmp_path: Path, same: str) -> None:
    server.start_run(num_steps=100_000)
    server.wait_for_step(1)
    flags = {"ready_file": tmp_path / "twin.json"}
    if same == "port":
        command = server.command(address=server.address, data_directory=tmp_path / "other", **flags)
    else:
        command = server.command(**flags)
    twin = subprocess.run(command, env=server.environment(), capture_output=True, timeout=WAIT_SECONDS, check=False)
    assert twin.returncode == 3, twin.stderr
    assert not (tmp_path / "twin.json").exists()
    step = max(payload.step.step for payload in payloads(server.run_directory()))
    server.wait_for_step(step + 1)


def test_sigterm_checkpoints_and_ends_everything(server: GpuServer) -> None:
    server.start_run(num_steps=100_000)
    server.wait_for_step(2)
    assert server.terminate() == 0
    summary = summary_of(server.run_directory())
    assert summary.state == event_pb2.RUN_STATE_INTERRUPTED
    assert summary.last_checkpoint is not None
    assert server.living_processes() == []
    assert not (server.root / "ready.json").exists()


def test_keep_engines_leaves_them_training(tmp_path: Path) -> None:
    server = GpuServer(tmp_path, keep_engines=True)
    try:
        server.start()
        server.start_run(num_steps=100_000)
        server.wait_for_step(2)
        [before] = server.shims()
        assert server.terminate() == 0
        reached = summary_of(server.run_directory()).last_run_sequence
        wait_for(lambda: summary_of(server.run_directory()).last_run_sequence > reached)
        server.start()
        assert [shim["engine_pid"] for shim in server.shims()] == [before["engine_pid"]]
        server.stop_run("CANCEL")
        assert server.watch_to_end()[-1].run_state.state == event_pb2.RUN_STATE_CANCELLED
    finally:
        server.clean_up()


def test_an_accepted_run_that_no_engine_had_is_started_by_the_next_server(server: GpuServer, tmp_path: Path) -> None:
    # The state that a crash between run.json and the engine leaves.
    server.start_run("01FIRST")
    server.watch_to_end("01FIRST")
    server.kill()
    source, target = server.run_directory("01FIRST"), server.run_directory("01SECOND")
    target.mkdir(parents=True)
    content = (source / "run.json").read_text().replace("01FIRST", "01SECOND")
    (target / "run.json").write_text(content)
    server.start()
    assert server.watch_to_end("01SECOND")[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED


def test_an_idle_engine_leaves_after_its_time(tmp_path: Path) -> None:
    server = GpuServer(tmp_path, engine_idle_seconds=0.1)
    try:
        server.start()
        server.start_run()
        server.watch_to_end()
        wait_for(lambda: not server.living_processes(), what="the idle engine's end")
        server.start_run("01NEXT")
        assert server.watch_to_end("01NEXT")[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
    finally:
        server.clean_up()
