"""Control begins again from an old backup, or from nothing, while its node's runs go on: no run is mixed up with
another's, attempts rise above what the node knows, and another installation's node is left alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.fakes.gpu_runs import payloads
from tests.faults.cluster import Cluster, running_cluster, wait_for
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2


def run(trial: Trial) -> list[Finding]:
    """Even seeds restore a backup, odd ones wipe control's directory."""
    with running_cluster(trial.directory, "a") as cluster:
        violations = _restore(cluster) if trial.seed % 2 == 0 else _wipe(cluster)
    return [Finding(promise="R32", tried=1, held=0 if violations else 1, violations=tuple(violations))]


def _restore(cluster: Cluster) -> list[str]:
    job_id = cluster.start_job(num_steps=200, save_every_steps=5, script={"step_seconds": 0.02})
    cluster.node_of(job_id)
    wait_for("a checkpoint", lambda: cluster.replicated_step(job_id))
    backup = cluster.back_up()
    # Since then: the attempt was lost and another one runs, and there is a job that the backup does not know.
    _kill_engine(cluster)
    wait_for("the second attempt", lambda: _has_steps(cluster, job_id, 2))
    unknown = cluster.start_job(num_steps=5)
    cluster.kill_control()
    cluster.restore(backup, cluster.root / "restored")
    cluster.start_control()
    cluster.wait_for_nodes("a")
    assert cluster.job(job_id).attempt == 1
    job = cluster.wait_for_state(job_id, event_pb2.JOB_STATE_SUCCEEDED)
    violations = []
    attempts = {event.attempt for event in cluster.log(job_id)}
    if job.attempt <= 2 or 2 in attempts:
        violations.append(f"restored: ended with attempt {job.attempt}, its log has {sorted(attempts)}")
    if any(listed.job_id == unknown for listed in cluster.client.jobs.list()):
        violations.append("restored: a job that was made after the backup is there")
    runs = cluster.nodes["a"].data_directory / "runs"
    # A walk passes over what goes while it looks; a path's glob does not.
    wait_for("every run to be released", lambda: not any("run.json" in names for _, _, names in os.walk(runs)))
    return violations


def _wipe(cluster: Cluster) -> list[str]:
    old_job = cluster.start_job(num_steps=100_000, script={"step_seconds": 0.02})
    cluster.node_of(old_job)
    wait_for("its steps", lambda: _has_steps(cluster, old_job, 1))
    cluster.kill_control()
    cluster.control_directory = cluster.root / "wiped"
    cluster.start_control()
    new_job = cluster.start_job(num_steps=5)
    problem = wait_for("the node's refusal", lambda: "".join(node.problem for node in cluster.client.nodes.list()))
    violations = []
    if "WRONG_INSTALLATION" not in problem:
        violations.append(f"wiped: the node's problem is {problem!r}")
    reached = len(payloads(cluster.nodes["a"].run_directory(old_job)))
    wait_for("the old run to go on", lambda: len(payloads(cluster.nodes["a"].run_directory(old_job))) > reached)
    job = cluster.job(new_job)
    if job.state != event_pb2.JOB_STATE_QUEUED or job.attempt:
        violations.append(f"wiped: the new job is {event_pb2.JobState.Name(job.state)}, attempt {job.attempt}")
    # What an operator does to give the node to the new installation, as docs/operations.md says it.
    server = cluster.nodes["a"]
    server.terminate()
    _disown(server.data_directory)
    server.start()
    cluster.wait_for_state(new_job, event_pb2.JOB_STATE_SUCCEEDED)
    return violations


def _kill_engine(cluster: Cluster) -> None:
    (shim,) = cluster.nodes["a"].shims()
    os.kill(shim["engine_pid"], signal.SIGKILL)


def _has_steps(cluster: Cluster, job_id: str, attempt: int) -> bool:
    directory = cluster.nodes["a"].run_directory(job_id, attempt)
    return any(payload.HasField("step") for payload in payloads(directory))


def _disown(data_directory: Path) -> None:
    assert json.loads((data_directory / "node.json").read_text())["installation_id"]
    (data_directory / "node.json").unlink()
    (data_directory / "runs").rename(data_directory.with_name("runs-of-the-old-installation"))


SCENARIO = Scenario(name="old_backup", promises=("R32",), num_trials=10, trial_seconds=20.0, run=run)
