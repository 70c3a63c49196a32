"""R15: a device whose memory does not come back is told, passed over and taken back; its node goes on and ends."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tests.fakes.cgroups import frozen
from tests.fakes.fake_device_server import held_file
from tests.fakes.gpu_runs import WAIT_SECONDS, wait_for
from tests.fakes.gpu_server import INSTALLATION, GpuServer
from tests.faults.nodes import running_node, seconds_since
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import errors_pb2, event_pb2
from tunesmith.gpu.v1 import run_service_pb2

_HELD_BYTES = 2 << 30
# For an engine, and for its memory.
GRACE_SECONDS = 1.0


def _reasons(server: GpuServer) -> list[str]:
    """What control is told of each device."""
    request = run_service_pb2.WatchNodeRequest(installation_id=INSTALLATION)
    reports = server.runs.WatchNode(request, timeout=WAIT_SECONDS)
    devices = next(reports).devices
    reports.cancel()
    return [one.quarantine_reason for one in devices]


def _lose_engine(server: GpuServer, job_id: str) -> list[event_pb2.EventPayload]:
    """A run on the first device whose engine dies, and leaves 2 GiB behind."""
    server.start_run(job_id, num_steps=100_000)
    server.wait_for_step(2, job_id)
    held_file(server.root, 0).write_text(str(_HELD_BYTES))
    [shim] = [one for one in server.shims() if (one["run_directory"] or "").endswith(f"{job_id}/1")]
    os.kill(shim["engine_pid"], signal.SIGKILL)
    return server.watch_to_end(job_id)


def lose_memory(server: GpuServer) -> tuple[list[str], float]:
    """What is wrong with a node of which a device's memory does not come back, and the seconds until it said so."""
    problems: list[str] = []
    start = time.monotonic()
    events = _lose_engine(server, "01LOST")
    seconds = seconds_since(start)
    if events[-1].run_state.failure.reason != errors_pb2.ERROR_REASON_ENGINE_KILLED:
        problems.append("the run's failure is named otherwise")
    if not any(payload.warning.code == "device-quarantined" for payload in events):
        problems.append("the job's log does not tell of it")
    wait_for(lambda: _reasons(server)[0], what="a device in quarantine")
    if _reasons(server)[1]:
        problems.append("the other device is in quarantine too")
    for number in (1, 2):
        server.start_run(f"01NEXT{number}", num_steps=3)
        if server.watch_to_end(f"01NEXT{number}")[-1].run_state.state != event_pb2.RUN_STATE_SUCCEEDED:
            problems.append("the other device does not train")
        if _device_of(server, f"01NEXT{number}") != "cuda:1":
            problems.append("a run was placed on the device in quarantine")
    held_file(server.root, 0).unlink()
    wait_for(lambda: not _reasons(server)[0], what="the end of the quarantine")
    _lose_engine(server, "01AGAIN")
    wait_for(lambda: _reasons(server)[0], what="a device in quarantine again")
    if server.terminate() != 0:
        problems.append("the server does not end in order")
    server.start()
    found = wait_for(lambda: any(reasons := _reasons(server)) and reasons, what="the quarantine behind a restart")
    if found[1]:
        problems.append("behind a restart the other device is in quarantine")
    held_file(server.root, 0).unlink()
    wait_for(lambda: not _reasons(server)[0], what="the end of the quarantine behind a restart")
    if server.terminate() != 0:
        problems.append("the server does not end in order behind a restart")
    server.start()
    if any(_reasons(server)):
        problems.append("what is free again is in quarantine behind a restart")
    return problems, seconds


def keep_process(server: GpuServer) -> tuple[list[str], float]:
    """The same for an engine that the kernel does not let die. Raises OSError where that cannot be arranged."""
    problems: list[str] = []
    server.start_run("01KEPT", num_steps=100_000)
    server.wait_for_step(2, "01KEPT")
    [shim] = server.shims()
    start = time.monotonic()
    with frozen(shim["engine_pid"]):
        server.stop_run("CANCEL", job_id="01KEPT", grace_seconds=GRACE_SECONDS)
        [reason, _] = wait_for(lambda: any(found := _reasons(server)) and found, what="a device in quarantine")
        seconds = seconds_since(start)
        if str(shim["engine_pid"]) not in reason:
            problems.append("the quarantine does not name the process")
        if server.get_run("01KEPT").state == event_pb2.RUN_STATE_CANCELLED:
            problems.append("a run is said to be cancelled whose process is there")
        server.start_run("01BESIDE", num_steps=3)
        if server.watch_to_end("01BESIDE")[-1].run_state.state != event_pb2.RUN_STATE_SUCCEEDED:
            problems.append("the other device does not train")
    if server.watch_to_end("01KEPT")[-1].run_state.state != event_pb2.RUN_STATE_CANCELLED:
        problems.append("the run is not said to be cancelled once its process is gone")
    wait_for(lambda: not any(_reasons(server)), what="the end of the quarantine")
    return problems, seconds


def _device_of(server: GpuServer, job_id: str) -> str:
    device = json.loads((server.run_directory(job_id) / "run.json").read_text())["device"]
    return f"{device['type']}:{device['index']}"


def _run(trial: Trial) -> list[Finding]:
    with running_node(trial.directory, fake_devices=True, grace_seconds=GRACE_SECONDS) as server:
        lose = keep_process if trial.seed % 2 and Path("/sys/fs/cgroup/freezer").is_dir() else lose_memory
        problems, seconds = lose(server)
    return [
        Finding(
            promise="R15",
            tried=1,
            held=int(not problems),
            violations=tuple(problems),
            worst=seconds,
            unit="s",
            what="until a device that holds on to memory was told, with a grace of 1 s",
        )
    ]


SCENARIO = Scenario(name="quarantine", promises=("R15",), num_trials=10, trial_seconds=12, run=_run)
