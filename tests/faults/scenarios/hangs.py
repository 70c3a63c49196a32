"""R17: an engine that hangs is found by the progress that it does not make, ended, and named HANG with its stacks."""

from __future__ import annotations

from random import Random

from tests.fakes.gpu_server import GpuServer
from tests.fakes.hanging import WAYS
from tests.faults.nodes import last_pause_seconds, log_lines, running_node
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import errors_pb2, event_pb2

HANG_LIMIT_SECONDS = 3.0
# What the contract allows beyond the limit.
_ALLOWED_SECONDS = 30.0
_PLACES: tuple[str | int, ...] = ("PLANNING", "LOADING", "TRAINING", 3, "SAVING")
# An engine that is stopped tells nothing of itself.
_TELLS_PYTHON = frozenset(WAYS) - {"stop"}


def hang(server: GpuServer, *, way: str, place: str | int, job_id: str) -> tuple[list[str], float]:
    """Have a run hang; gives what is wrong with what came of it, and the seconds beyond the limit."""
    problems: list[str] = []
    server_pid = server.pid
    server.start_run(job_id, num_steps=6, script={"hang": {"at": place, "way": way}, "spawn_setsid_child": True})
    events = server.watch_to_end(job_id)
    what = f"{way} at {place}"
    last = events[-1].run_state
    failure = last.failure
    if (last.state, failure.reason) != (event_pb2.RUN_STATE_FAILED, errors_pb2.ERROR_REASON_HANG):
        problems.append(f"{what}: ended {event_pb2.RunState.Name(last.state)} with {failure.reason}")
    lines = log_lines(events)
    if not any("thread" in line for line in lines):
        problems.append(f"{what}: no stacks in the log")
    if way in _TELLS_PYTHON and not any("hanging.py" in line for line in lines):
        problems.append(f"{what}: the place is not in the stacks")
    late = last_pause_seconds(server.run_directory(job_id), len(lines) + 1) - HANG_LIMIT_SECONDS
    if not 0 <= late <= _ALLOWED_SECONDS:
        problems.append(f"{what}: ended {late:.1f} s beyond the limit")
    server.start_run(job_id, attempt=2, num_steps=2)
    if server.watch_to_end(job_id, attempt=2)[-1].run_state.state != event_pb2.RUN_STATE_SUCCEEDED:
        problems.append(f"{what}: the next attempt did not succeed")
    if server.pid != server_pid or len(server.living_processes()) != 1:
        problems.append(f"{what}: something of it is left, or the server is another")
    return problems, late


def _run(trial: Trial) -> list[Finding]:
    random = Random(trial.seed)
    way, place = random.choice(sorted(WAYS)), random.choice(_PLACES)
    with running_node(trial.directory, hang_limit_seconds=HANG_LIMIT_SECONDS) as server:
        problems, late = hang(server, way=way, place=place, job_id="01HANG")
    return [
        Finding(
            promise="R17",
            tried=1,
            held=int(not problems),
            violations=tuple(problems),
            worst=late,
            unit="s",
            what="beyond the limit until a hanging engine's run is over",
        )
    ]


SCENARIO = Scenario(name="hangs", promises=("R17",), num_trials=40, trial_seconds=10, run=_run)
