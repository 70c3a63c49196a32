"""R16: an engine whose server never returns writes a checkpoint and ends; the next server finds what it left."""

from __future__ import annotations

import time
from typing import Any

from tests.fakes.gpu_runs import summary_of, wait_for
from tests.fakes.gpu_server import GpuServer
from tests.faults.nodes import running_node, seconds_since
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2

ORPHAN_LIMIT_SECONDS = 1.5
# For the step in hand, the checkpoint, and the last of its processes.
_ALLOWED_SECONDS = 30.0


def orphan(server: GpuServer, *, job_id: str, ends_stopped: bool = False) -> tuple[list[str], float]:
    """Kill the server for good; what is wrong with what its engine did then, and the seconds beyond the limit."""
    problems: list[str] = []
    script: dict[str, Any] = {"freeze_at": 8, "ignore_stop": True} if ends_stopped else {}
    script |= {"spawn_setsid_child": True, "step_seconds": 0.05}
    server.start_run(job_id, num_steps=1_000_000, save_every_steps=3, script=script)
    server.wait_for_step(7, job_id)
    server.kill()
    start = time.monotonic()
    wait_for(lambda: summary_of(server.run_directory(job_id)).is_over, what="the orphan's end")
    late = seconds_since(start) - ORPHAN_LIMIT_SECONDS
    wait_for(lambda: not server.living_processes(), what="the end of all of it")
    summary = summary_of(server.run_directory(job_id))
    if summary.state != event_pb2.RUN_STATE_INTERRUPTED or summary.last_checkpoint is None:
        problems.append(f"ended {event_pb2.RunState.Name(summary.state)}")
    elif not ends_stopped and summary.last_checkpoint.step % 3 == 0 and summary.last_checkpoint.step < 7:
        problems.append(f"the checkpoint is of step {summary.last_checkpoint.step}")
    if late > _ALLOWED_SECONDS:
        problems.append(f"ended {late:.1f} s beyond the limit")
    server.start()
    if server.get_run(job_id).state != summary.state or server.get_run(job_id).last_checkpoint_step < 6:
        problems.append("the next server tells otherwise")
    return problems, late


def _run(trial: Trial) -> list[Finding]:
    with running_node(trial.directory, orphan_limit_seconds=ORPHAN_LIMIT_SECONDS, grace_seconds=2) as server:
        problems, late = orphan(server, job_id="01ORPHAN", ends_stopped=bool(trial.seed % 2))
    return [
        Finding(
            promise="R16",
            tried=1,
            held=int(not problems),
            violations=tuple(problems),
            worst=late,
            unit="s",
            what="beyond the orphan limit until an engine without a server was gone",
        )
    ]


SCENARIO = Scenario(name="orphans", promises=("R16",), num_trials=20, trial_seconds=8, run=_run)
