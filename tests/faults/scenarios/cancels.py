"""R14: CANCELLED is said when every process of the run is gone and memory is back, whatever the engine does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from random import Random
from typing import Any

import psutil

from tests.fakes.gpu_runs import is_alive
from tests.fakes.gpu_server import GpuServer
from tests.faults.nodes import running_node, seconds_since
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2

_ALLOWED_SECONDS = 30.0
_SLACK_BYTES = 64 * 1024 * 1024
_GRACE_SECONDS = 1.0
# What an engine and its children do about a cancel.
BEHAVIORS: Mapping[str, dict[str, Any]] = {
    "obeys": {},
    "obeys-with-detached-child": {"spawn_setsid_child": True},
    "obeys-with-pool": {"spawn_pool": 3, "spawn_setsid_child": True},
    "keeps-memory": {"leak_bytes": 1},
    "ignores": {"ignore_stop": True, "spawn_pool": 2},
    "is-stopped": {"freeze_at": 3, "ignore_stop": True, "spawn_setsid_child": True},
    "all-of-it": {"freeze_at": 3, "ignore_stop": True, "spawn_setsid_child": True, "spawn_pool": 3},
    "shim-is-frozen": {"spawn_setsid_child": True},
}
# The engine goes on to the next run.
STAYS_WARM = frozenset({"obeys", "obeys-with-detached-child", "obeys-with-pool"})


def cancel(server: GpuServer, *, behavior: str, job_id: str) -> tuple[list[str], float]:
    """Cancel a run; gives what is wrong with what came of it, and the seconds that it took."""
    problems: list[str] = []
    script = {**BEHAVIORS[behavior], "ballast_bytes": 100_000_000, "step_seconds": 0.02}
    server.start_run(job_id, num_steps=100_000, script=script)
    server.wait_for_step(2, job_id)
    [shim] = server.shims()
    start = time.monotonic()
    server.stop_run("CANCEL", job_id=job_id, grace_seconds=_GRACE_SECONDS)
    events = server.watch_to_end(job_id)
    seconds = seconds_since(start)
    left = [pid for pid in server.living_processes() if is_alive(pid)]
    warm = behavior in STAYS_WARM
    if events[-1].run_state.state != event_pb2.RUN_STATE_CANCELLED:
        problems.append(f"{behavior}: ended {event_pb2.RunState.Name(events[-1].run_state.state)}")
    if left != ([shim["engine_pid"]] if warm else []):
        problems.append(f"{behavior}: {len(left)} processes are left")
    released = events[-2].memory_released
    if released.engine_ended == warm or released.resident_bytes > _SLACK_BYTES:
        problems.append(f"{behavior}: memory is not said to be back")
    if warm and psutil.Process(shim["engine_pid"]).memory_info().rss > 100_000_000 + _SLACK_BYTES:
        problems.append(f"{behavior}: the engine still holds the run's memory")
    if seconds > _ALLOWED_SECONDS:
        problems.append(f"{behavior}: took {seconds:.1f} s")
    return problems, seconds


def cancel_behind_a_frozen_shim(server: GpuServer, *, job_id: str) -> tuple[list[str], float]:
    """The same, with a shim that is stopped: the server notices, and ends and buries it."""
    problems: list[str] = []
    server.start_run(job_id, num_steps=100_000, script=BEHAVIORS["shim-is-frozen"])
    server.wait_for_step(2, job_id)
    [shim] = server.shims()
    os.kill(shim["shim_pid"], signal.SIGSTOP)
    start = time.monotonic()
    server.stop_run("CANCEL", job_id=job_id, grace_seconds=_GRACE_SECONDS)
    events = server.watch_to_end(job_id)
    seconds = seconds_since(start)
    if events[-1].run_state.state != event_pb2.RUN_STATE_CANCELLED or server.living_processes():
        problems.append("shim-is-frozen: not cancelled, or something is left")
    return problems, seconds


def _run(trial: Trial) -> list[Finding]:
    behavior = Random(trial.seed).choice(sorted(BEHAVIORS))
    with running_node(trial.directory, shim_answer_seconds=2) as server:
        if behavior == "shim-is-frozen":
            problems, seconds = cancel_behind_a_frozen_shim(server, job_id="01CANCEL")
        else:
            problems, seconds = cancel(server, behavior=behavior, job_id="01CANCEL")
    return [
        Finding(
            promise="R14",
            tried=1,
            held=int(not problems),
            violations=tuple(problems),
            worst=seconds,
            unit="s",
            what="from a cancel, with a grace of 1 s, to CANCELLED",
        )
    ]


SCENARIO = Scenario(name="cancels", promises=("R14",), num_trials=40, trial_seconds=8, run=_run)
