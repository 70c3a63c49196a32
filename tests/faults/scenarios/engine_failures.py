"""R18: each way in which an engine fails has its own name, and neither the server nor the run beside it feels it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.fakes.gpu_runs import payloads, wait_for
from tests.fakes.gpu_server import GpuServer
from tests.faults.nodes import log_lines, running_node
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import errors_pb2, event_pb2

# Of the frames that a deadly signal leaves in the log.
_PLACE = "stub_engine.py"
_NEIGHBOR = "01NEIGHBOR"


@dataclass(frozen=True, kw_only=True)
class Way:
    """What the engine's script says, and what the failure must say."""

    script: Mapping[str, Any]
    reason: str
    fields: Mapping[str, Any]
    # Stands in the log.
    logged: str = ""


WAYS: Mapping[str, Way] = {
    "segmentation-fault": Way(
        script={"signal_at_step": 2, "signal": 11},
        reason="ENGINE_KILLED",
        fields={"signal": 11},
        logged=_PLACE,
    ),
    "abort": Way(
        script={"signal_at_step": 2, "signal": 6}, reason="ENGINE_KILLED", fields={"signal": 6}, logged=_PLACE
    ),
    "kill": Way(script={"signal_at_step": 2, "signal": 9}, reason="ENGINE_KILLED", fields={"signal": 9}),
    "exit": Way(script={"exit_at_step": 2, "exit_code": 7}, reason="ENGINE_EXITED", fields={"exit_status": 7}),
    "exit-with-success": Way(
        script={"exit_at_step": 2, "exit_code": 0}, reason="ENGINE_EXITED", fields={"exit_status": 0}
    ),
    "exception": Way(script={"fail_at_step": 2}, reason="TRAINING", fields={"exception_type": "ArithmeticError"}),
}


def start_neighbor(server: GpuServer) -> None:
    """A run on the other device, which goes on beside whatever fails."""
    server.start_run(_NEIGHBOR, num_steps=1_000_000, script={"step_seconds": 0.05})
    server.wait_for_step(1, _NEIGHBOR)


def fail(server: GpuServer, way: str) -> list[str]:
    """What is wrong with how a failure was told, and with what is beside it."""
    problems: list[str] = []
    job_id, expected = f"01FAIL{list(WAYS).index(way)}", WAYS[way]
    server_pid, neighbor = server.pid, _newest(server)
    server.start_run(job_id, script=dict(expected.script))
    events = server.watch_to_end(job_id)
    failure = events[-1].run_state.failure
    name = errors_pb2.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
    found = {field: getattr(failure, field) for field in expected.fields}
    if events[-1].run_state.state != event_pb2.RUN_STATE_FAILED or name != expected.reason or found != expected.fields:
        problems.append(f"{way}: named {name} with {found}")
    if expected.logged and not any(expected.logged in line for line in log_lines(events)):
        problems.append(f"{way}: the log does not say where")
    wait_for(lambda: _newest(server) > neighbor, what="the neighbor's next step")
    if server.pid != server_pid or server.get_run(_NEIGHBOR).state != event_pb2.RUN_STATE_RUNNING:
        problems.append(f"{way}: the server or the neighbor did not go on")
    return problems


def _newest(server: GpuServer) -> int:
    return max(payload.step.step for payload in payloads(server.run_directory(_NEIGHBOR)))


def _run(trial: Trial) -> list[Finding]:
    ways = list(WAYS)
    Random(trial.seed).shuffle(ways)
    with running_node(trial.directory, fake_devices=True) as server:
        start_neighbor(server)
        problems = [problem for way in ways for problem in fail(server, way)]
    return [Finding(promise="R18", tried=len(ways), held=len(ways) - len(problems), violations=tuple(problems))]


SCENARIO = Scenario(name="engine-failures", promises=("R18",), num_trials=10, trial_seconds=12, run=_run)
