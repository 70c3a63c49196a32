"""R14, R17 and R18 with an engine that trains: a tiny llama on the CPU."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.fakes.gpu_runs import is_alive, wait_for
from tests.fakes.gpu_server import GpuServer
from tests.faults.nodes import log_lines, running_node, seconds_since
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import errors_pb2, event_pb2

# An engine imports torch and loads within this, also on a machine that has other things to do.
_HANG_LIMIT_SECONDS = 60.0
_ALLOWED_SECONDS = 30.0
# Whoever watches a run that hangs must wait for longer than any limit that a slow machine's pauses may come to.
_WATCH_SECONDS = 4 * _HANG_LIMIT_SECONDS + _ALLOWED_SECONDS + 60.0
_SLACK_BYTES = 64 * 1024 * 1024
# So many that no run ends by itself, and few enough to be planned at once.
_ENDLESS = 100_000
_WAITING_PLANNER = ["-m", "gpu_service.planner", "--wait"]
# A child that is being started has its parent's command line until it has its own.
_START_SECONDS = 5.0


def _start(server: GpuServer, job_id: str) -> int:
    """A run that is training; its engine's process id."""
    server.start_run(job_id, num_steps=_ENDLESS)
    server.wait_for_step(3, job_id)
    [shim] = server.shims()
    return int(shim["engine_pid"])


def left_of_run(server: GpuServer, engine_pid: int) -> list[int]:
    """Living processes but the engine and at most one planner that waits for its next run."""
    others = [pid for pid in server.living_processes() if pid != engine_pid]
    waiting = [pid for pid in others if is_waiting_planner(pid, engine_pid)][:1]
    return [pid for pid in others if pid not in waiting]


def is_waiting_planner(pid: int, engine_pid: int) -> bool:
    """Whether it waits for the engine's next run: the engine holds the other end of what it reads its order from.

    One that a run was given has the same command line; the engine has closed that end, and it is the run's.
    """
    try:
        planner, engine = psutil.Process(pid), psutil.Process(engine_pid)
        deadline = time.monotonic() + _START_SECONDS
        while planner.cmdline() == engine.cmdline() and time.monotonic() < deadline:
            time.sleep(0.01)
        return (
            planner.ppid() == engine_pid
            and planner.cmdline()[1:] == _WAITING_PLANNER
            and Path(f"/proc/{pid}/fd/0").readlink() in _open_files(engine_pid)
        )
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False


def _open_files(pid: int) -> set[Path]:
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(descriptor.readlink())
    return found


def cancel_while_planning(server: GpuServer) -> list[str]:
    """A run that the engine's waiting planner has in hand, and does not get ahead with, is cancelled."""
    server.start_run("01BEFORE", num_steps=2)
    server.watch_to_end("01BEFORE")
    [shim] = server.shims()
    engine_pid = int(shim["engine_pid"])

    def waiting() -> list[int]:
        return [pid for pid in server.living_processes() if is_waiting_planner(pid, engine_pid)]

    [planner_pid] = wait_for(waiting, what="the waiting planner")
    os.kill(planner_pid, signal.SIGSTOP)
    server.start_run("01PLANNING", num_steps=_ENDLESS)
    problems: list[str] = []
    wait_for(lambda: not is_waiting_planner(planner_pid, engine_pid), what="the run to take the planner")
    if left_of_run(server, engine_pid) != [planner_pid]:
        problems.append("cancel while planning: the planner is not the run's")
    server.stop_run("CANCEL", job_id="01PLANNING", grace_seconds=_ALLOWED_SECONDS)
    events = server.watch_to_end("01PLANNING")
    if events[-1].run_state.state != event_pb2.RUN_STATE_CANCELLED:
        problems.append(f"cancel while planning: {event_pb2.RunState.Name(events[-1].run_state.state)}")
    if is_alive(planner_pid) or left_of_run(server, engine_pid):
        problems.append("cancel while planning: something of the run is left")
    if not is_alive(engine_pid):
        problems.append("cancel while planning: it cost the engine")
    return problems


def cancel(server: GpuServer) -> tuple[list[str], float]:
    """A run that trains is cancelled; the problems, and the seconds until CANCELLED."""
    server.start_run("01WARM", num_steps=2)
    server.watch_to_end("01WARM")
    [shim] = server.shims()
    base_line = psutil.Process(shim["engine_pid"]).memory_info().rss
    engine_pid = _start(server, "01CANCEL")
    start = time.monotonic()
    server.stop_run("CANCEL", job_id="01CANCEL")
    events = server.watch_to_end("01CANCEL")
    seconds = seconds_since(start)
    problems: list[str] = []
    if events[-1].run_state.state != event_pb2.RUN_STATE_CANCELLED or seconds > _ALLOWED_SECONDS:
        problems.append(f"cancel: {event_pb2.RunState.Name(events[-1].run_state.state)} after {seconds:.1f} s")
    if left_of_run(server, engine_pid):
        problems.append("cancel: something of the run is left")
    if is_alive(engine_pid) and psutil.Process(engine_pid).memory_info().rss > base_line + _SLACK_BYTES:
        problems.append("cancel: memory is not back at the base line")
    return problems, seconds


def _crash(server: GpuServer) -> list[str]:
    os.kill(_start(server, "01CRASH"), signal.SIGSEGV)
    events = server.watch_to_end("01CRASH")
    failure = events[-1].run_state.failure
    if (failure.reason, failure.signal) != (errors_pb2.ERROR_REASON_ENGINE_KILLED, signal.SIGSEGV):
        return ["segmentation fault: named otherwise"]
    if not any("loop.py" in line for line in log_lines(events)):
        return ["segmentation fault: the log does not say where"]
    return []


def _hang(server: GpuServer) -> tuple[list[str], float]:
    engine_pid = _start(server, "01HANG")
    start = time.monotonic()
    os.kill(engine_pid, signal.SIGSTOP)
    events = server.watch_to_end("01HANG")
    seconds = seconds_since(start)
    failure = events[-1].run_state.failure
    if failure.reason != errors_pb2.ERROR_REASON_HANG:
        return [f"stopped: named {errors_pb2.ErrorReason.Name(failure.reason)}, after {seconds:.1f} s"], seconds
    # Where the machine was slow within the phase, the limit is more than the setting; the failure says how much.
    late = seconds - float(failure.details["limit_seconds"])
    return ([f"stopped: found {late:.1f} s beyond the limit"] if late > _ALLOWED_SECONDS else []), late


def _run(trial: Trial) -> list[Finding]:
    with running_node(
        trial.directory,
        real_engine="gpu_service.engine",
        hang_limit_seconds=_HANG_LIMIT_SECONDS,
        watch_seconds=_WATCH_SECONDS,
    ) as server:
        cancelled, seconds = cancel(server)
        planned = cancel_while_planning(server)
        crashed = _crash(server)
        # The longest takes as long as its limit, so that it is not tried every time.
        hung, late = _hang(server) if trial.seed % 3 == 0 else ([], 0.0)
    findings = [
        Finding(
            promise="R14",
            tried=2,
            held=int(not cancelled) + int(not planned),
            violations=(*cancelled, *planned),
            worst=seconds,
            unit="s",
            what="from a cancel to CANCELLED, with the real engine",
        ),
        Finding(promise="R18", tried=1, held=int(not crashed), violations=tuple(crashed)),
    ]
    if trial.seed % 3 == 0:
        findings.append(
            Finding(
                promise="R17",
                tried=1,
                held=int(not hung),
                violations=tuple(hung),
                worst=late,
                unit="s",
                what="beyond the limit until a stopped real engine's run is over",
            )
        )
    return findings


SCENARIO = Scenario(
    name="real-engine", promises=("R14", "R17", "R18"), num_trials=12, trial_seconds=70, run=_run, real_engine=True
)
