"""R14, R17 and R18 with an engine that trains: a tiny llama on the CPU."""

from __future__ import annotations

import os
import signal
import time

import psutil

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


def _start(server: GpuServer, job_id: str) -> int:
    """A run that is training; its engine's process id."""
    server.start_run(job_id, num_steps=_ENDLESS)
    server.wait_for_step(3, job_id)
    [shim] = server.shims()
    return int(shim["engine_pid"])


def _cancel(server: GpuServer) -> tuple[list[str], float]:
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
    left = server.living_processes()
    if left not in ([], [engine_pid]):
        problems.append("cancel: something of the run is left")
    if left and psutil.Process(engine_pid).memory_info().rss > base_line + _SLACK_BYTES:
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
        cancelled, seconds = _cancel(server)
        crashed = _crash(server)
        # The longest takes as long as its limit, so that it is not tried every time.
        hung, late = _hang(server) if trial.seed % 3 == 0 else ([], 0.0)
    findings = [
        Finding(
            promise="R14",
            tried=1,
            held=int(not cancelled),
            violations=tuple(cancelled),
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
