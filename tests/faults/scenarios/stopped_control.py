"""Control itself is stopped for three leases: what it could not hear meanwhile is no silence of a node, so no job is
taken from a node that worked on."""

from __future__ import annotations

import os
import signal
import time

from tests.faults.cluster import LEASE_SECONDS, Cluster, running_cluster, wait_for
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2


def run(trial: Trial) -> list[Finding]:
    """A job on one node, another node that is free for it, and a control that is stopped and goes on."""
    with running_cluster(trial.directory, "ab") as cluster:
        return _try(cluster)


def _try(cluster: Cluster) -> list[Finding]:
    job_id = cluster.start_job(num_steps=500, save_every_steps=5, script={"step_seconds": 0.02})
    cluster.node_of(job_id)
    wait_for("a replicated checkpoint", lambda: cluster.replicated_step(job_id))
    os.kill(cluster.control_pid, signal.SIGSTOP)
    try:
        time.sleep(3 * LEASE_SECONDS)
    finally:
        os.kill(cluster.control_pid, signal.SIGCONT)
    job = cluster.wait_for_state(job_id, event_pb2.JOB_STATE_SUCCEEDED)
    log = cluster.log(job_id)
    violations = []
    if job.attempt != 1:
        violations.append(f"the job was taken from its node: it ended with attempt {job.attempt}")
    if any(event.payload.HasField("node_reachability") for event in log):
        violations.append("a node that worked on was called unreachable")
    return [Finding(promise="R23", tried=1, held=0 if violations else 1, violations=tuple(violations))]


SCENARIO = Scenario(name="stopped_control", promises=("R23",), num_trials=10, trial_seconds=20.0, run=run)
