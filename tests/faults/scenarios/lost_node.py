"""A whole machine is lost, server, shim and engine at once, wherever its job stands: another node goes on with the job
from the last step that control has a copy of. A job that kills every engine ends FAILED, with its history."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

from tests.fakes.gpu_runs import payloads
from tests.faults.cluster import LEASE_SECONDS, Cluster, running_cluster, wait_for
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import errors_pb2, event_pb2

_NUM_STEPS = 40
_SAVE_EVERY = 5
_MAX_RETRIES = 2
_LIMIT_SECONDS = LEASE_SECONDS + 5.0

# Where the run stands when its node dies; None: its engine dies of the job itself, every time.
_PLACES: Sequence[str | int | None] = (
    *("PLANNING", "LOADING", "TRAINING", 3, 12, 27, "SAVING", None),
    *("DISPATCHING", "COLLECTING"),
)
# What kills control while it collects: the first artifact is here, the next is not.
_COLLECTING = "collect.before-output"


def run(trial: Trial) -> list[Finding]:
    """One job, two nodes; the seed chooses where the node dies."""
    place = _PLACES[trial.seed % len(_PLACES)]
    with running_cluster(trial.directory, "ab") as cluster:
        if place is None:
            return _try_poison(cluster)
        ways = {"DISPATCHING": _lose_while_dispatching, "COLLECTING": _lose_while_collecting}
        return _judge(cluster, place, *ways.get(str(place), _lose_while_running)(cluster, place))


def _lose_while_running(cluster: Cluster, place: str | int) -> tuple[str, str, float]:
    """The job, the node that it was on, and the seconds from its death to the second attempt."""
    free = cluster.root / "go-on"
    job_id = _start(cluster, {"step_seconds": 0.01, "hold_at": place, "until_file": str(free)})
    first = cluster.node_of(job_id)
    wait_for(f"the run to reach {place}", lambda: _stands_at(cluster, first, job_id, place))
    wait_for(f"step {_last_saved(place)} in control", lambda: cluster.replicated_step(job_id) == _last_saved(place))
    cluster.signal_node(first, signal.SIGKILL)
    moved_seconds = _wait_for_second(cluster, job_id)
    free.touch()
    return job_id, first, moved_seconds


def _lose_while_dispatching(cluster: Cluster, _: str | int) -> tuple[str, str, float]:
    """The node is stopped before it hears of the run, and killed once control waits for its answer."""
    first = "a"
    for name in cluster.nodes:
        cluster.client.nodes.drain(name)
    job_id = _start(cluster, {"step_seconds": 0.01})
    cluster.signal_node(first, signal.SIGSTOP)
    cluster.client.nodes.drain(first, undo=True)
    wait_for("the dispatch", lambda: cluster.job(job_id).state == event_pb2.JOB_STATE_DISPATCHING)
    assert cluster.job(job_id).node == first
    for name in set(cluster.nodes) - {first}:
        cluster.client.nodes.drain(name, undo=True)
    cluster.signal_node(first, signal.SIGKILL)
    return job_id, first, _wait_for_second(cluster, job_id)


def _lose_while_collecting(cluster: Cluster, _: str | int) -> tuple[str, str, float]:
    """Training is over and control has some of what it came to, when control and the node die; control comes back."""
    free = cluster.root / "go-on"
    job_id = _start(cluster, {"step_seconds": 0.01, "hold_at": "SAVING", "until_file": str(free)})
    first = cluster.node_of(job_id)
    wait_for("the last step in control", lambda: cluster.replicated_step(job_id) == _NUM_STEPS)
    cluster.failpoints.arm(_COLLECTING)
    free.touch()
    cluster.wait_for_end_of_control()
    cluster.signal_node(first, signal.SIGKILL)
    cluster.start_control()
    return job_id, first, _wait_for_second(cluster, job_id)


def _wait_for_second(cluster: Cluster, job_id: str) -> float:
    """Seconds until the second attempt."""
    started = time.monotonic()
    wait_for("the second attempt", lambda: cluster.job(job_id).attempt == 2)
    return time.monotonic() - started


def _start(cluster: Cluster, script: dict[str, Any]) -> str:
    return cluster.start_job(
        num_steps=_NUM_STEPS, save_every_steps=_SAVE_EVERY, script=script, max_retries=_MAX_RETRIES
    )


def _judge(cluster: Cluster, place: str | int, job_id: str, first: str, moved_seconds: float) -> list[Finding]:
    second = "b" if first == "a" else "a"
    expected = _last_saved(place)
    job = cluster.wait_for_state(job_id, event_pb2.JOB_STATE_SUCCEEDED)
    log = cluster.log(job_id)
    resumed = [event.payload.resumed.from_step for event in log if event.payload.HasField("resumed")]
    violations = []
    if moved_seconds > _LIMIT_SECONDS:
        violations.append(f"died at {place}: queued again after {moved_seconds:.1f} s")
    if resumed != ([expected] if expected else []):
        violations.append(f"died at {place}: went on from {resumed}, not from {expected}")
    if (job.attempt, job.node) != (2, second):
        violations.append(f"died at {place}: attempt {job.attempt} on {job.node}")
    steps = [event.payload.step.step for event in log if event.attempt == 2 and event.payload.HasField("step")]
    if steps != list(range(expected + 1, _NUM_STEPS + 1)):
        violations.append(f"died at {place}: the second attempt made steps {steps[:1]} to {steps[-1:]}")
    return [_finding(violations, moved_seconds)]


def _try_poison(cluster: Cluster) -> list[Finding]:
    job_id = cluster.start_job(num_steps=5, script={"exit_at_step": 1}, max_retries=_MAX_RETRIES)
    job = cluster.wait_for_state(job_id, event_pb2.JOB_STATE_FAILED)
    log = cluster.log(job_id)
    ends = [e.payload.run_state.failure.reason for e in log if e.payload.run_state.state == event_pb2.RUN_STATE_FAILED]
    violations = []
    if ends != [errors_pb2.ERROR_REASON_ENGINE_EXITED] * (_MAX_RETRIES + 1):
        violations.append(f"a job that kills its engine ended with the history {ends}")
    if job.failure.reason != errors_pb2.ERROR_REASON_RETRIES_EXHAUSTED or job.attempt != _MAX_RETRIES + 1:
        violations.append(f"a job that kills its engine ended with {job.failure.reason} after {job.attempt} attempts")
    return [_finding(violations, None)]


def _finding(violations: list[str], moved_seconds: float | None) -> Finding:
    return Finding(
        promise="R4",
        tried=1,
        held=0 if violations else 1,
        violations=tuple(violations),
        worst=moved_seconds,
        unit="s",
        what=f"from a node's loss to the next attempt, of {_LIMIT_SECONDS:.0f} s (lease {LEASE_SECONDS:.0f} s)",
    )


def _stands_at(cluster: Cluster, node: str, job_id: str, place: str | int) -> bool:
    seen = payloads(cluster.nodes[node].run_directory(job_id))
    if isinstance(place, int):
        return any(payload.step.step == place - 1 for payload in seen)
    phase = event_pb2.Phase.Value(f"PHASE_{place}")
    return any(payload.phase.phase == phase for payload in seen)


def _last_saved(place: str | int) -> int:
    """The newest checkpoint before the place. A step is held before it is made."""
    if isinstance(place, int):
        return (place - 1) // _SAVE_EVERY * _SAVE_EVERY
    return _NUM_STEPS if place in ("SAVING", "COLLECTING") else 0


SCENARIO = Scenario(name="lost_node", promises=("R4",), num_trials=70, trial_seconds=18.0, run=run)
