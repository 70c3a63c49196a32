"""A node that is stopped for three leases and comes back: another has finished its job, and nothing that the first one
did or does can be seen anywhere."""

from __future__ import annotations

import json
import signal
import time

import grpc

from tests.fakes.gpu_runs import payloads
from tests.fakes.gpu_server import error_info
from tests.faults.cluster import LEASE_SECONDS, Cluster, running_cluster, wait_for
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2
from tunesmith.gpu.v1 import run_service_pb2

_STOP_SECONDS = 10.0


def run(trial: Trial) -> list[Finding]:
    """One job, two nodes."""
    with running_cluster(trial.directory, "ab") as cluster:
        # Odd: the first node comes back while the second still trains.
        return _try(cluster, comes_back_early=trial.seed % 2 == 1)


def _try(cluster: Cluster, *, comes_back_early: bool) -> list[Finding]:
    job_id = cluster.start_job(num_steps=250, save_every_steps=5, script={"step_seconds": 0.02})
    first = cluster.node_of(job_id)
    second = "b" if first == "a" else "a"
    wait_for("a replicated checkpoint", lambda: cluster.replicated_step(job_id))
    cluster.signal_node(first, signal.SIGSTOP)
    stopped_at = time.monotonic()
    wait_for("the second attempt", lambda: cluster.job(job_id).attempt == 2 and cluster.job(job_id).progress.step)
    moved_seconds = time.monotonic() - stopped_at
    if not comes_back_early:
        cluster.wait_for_state(job_id, event_pb2.JOB_STATE_SUCCEEDED)
    time.sleep(max(0.0, 3 * LEASE_SECONDS - (time.monotonic() - stopped_at)))
    output = cluster.control_directory / "output"
    log_before, output_before = cluster.log(job_id), cluster.files_of(output)

    cluster.signal_node(first, signal.SIGCONT)
    continued_at = time.monotonic()
    wait_for("the old attempt's end", lambda: _ended(cluster, first, job_id))
    stop_seconds = time.monotonic() - continued_at
    cluster.wait_for_state(job_id, event_pb2.JOB_STATE_SUCCEEDED)

    violations = []
    log = cluster.log(job_id)
    if log[: len(log_before)] != log_before:
        violations.append("the log was changed")
    since = next(event.sequence for event in log if event.attempt == 2)
    if any(event.attempt == 1 for event in log[since:]):
        violations.append("an event of the old attempt is in the log after the new one began")
    if not comes_back_early and (log != log_before or cluster.files_of(output) != output_before):
        violations.append("what was committed changed after the old node came back")
    if stop_seconds > _STOP_SECONDS:
        violations.append(f"the old engine ended after {stop_seconds:.1f} s")
    resumed = [event.payload.resumed.from_step for event in log if event.payload.HasField("resumed")]
    if len(resumed) != 1 or resumed[0] < 5:
        violations.append(f"the second attempt resumed at {resumed}")
    violations += _old_epoch_is_refused(cluster, second, job_id)
    return [
        Finding(
            promise="R3",
            tried=1,
            held=0 if violations else 1,
            violations=tuple(violations),
            worst=stop_seconds,
            unit="s",
            what="from the return of a stopped node to the end of its old engine's run",
        ),
        Finding(promise="R4", tried=1, held=1, worst=moved_seconds, unit="s", what="from the stop to the next attempt"),
    ]


def _ended(cluster: Cluster, node: str, job_id: str) -> bool:
    """The run is over, or released already."""
    directory = cluster.nodes[node].run_directory(job_id)
    if not (directory / "run.json").exists():
        return True
    last = payloads(directory)[-1]
    return last.HasField("run_state") and last.run_state.state == event_pb2.RUN_STATE_CANCELLED


def _old_epoch_is_refused(cluster: Cluster, node: str, job_id: str) -> list[str]:
    """The node that had attempt 2 takes no StartRun of attempt 1."""
    server = cluster.nodes[node]
    request = server.request(job_id, attempt=1)
    with_owner = run_service_pb2.RunKey(installation_id=_installation(cluster, node), job_id=job_id, attempt=1)
    request.key.CopyFrom(with_owner)
    try:
        server.runs.StartRun(request, timeout=30)
    except grpc.RpcError as error:
        _, reason, _ = error_info(error)
        return [] if reason == "STALE_EPOCH" else [f"the old attempt was refused with {reason}"]
    return ["the old attempt was started again"]


def _installation(cluster: Cluster, node: str) -> str:
    return str(json.loads((cluster.nodes[node].data_directory / "node.json").read_text())["installation_id"])


SCENARIO = Scenario(name="fencing", promises=("R3", "R4"), num_trials=20, trial_seconds=30.0, run=run)
