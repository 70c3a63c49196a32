"""Only the GPU server is killed, again and again, while a job trains: its next one adopts what lives (R6)."""

from __future__ import annotations

import time

from tests.faults.driver import World, WorldConfig
from tests.faults.driver.verdict import came_back, ended_as_asked, judge
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2

# Between two kills the run is looked at, before and after.
_BETWEEN_SECONDS = 2.0


def run(trial: Trial) -> list[Finding]:
    """At the full number of kills."""
    return kill_servers(trial)


def kill_servers(trial: Trial, *, num_kills: int = 6) -> list[Finding]:
    """One job, many servers."""
    with World(WorldConfig(directory=trial.directory, seed=trial.seed)) as world:
        gate = trial.directory / "gate"
        script = {"step_seconds": 0.05, "hold_at": 2000, "until_file": str(gate)}
        project_id = world.create_project(
            "adoption", [world.upload("rows")], script=script, num_steps=2000, save_every_steps=100
        )
        job_id = world.start_job(project_id)
        world.wait_for_step(job_id, 3)
        (before,) = world.engines()
        for _ in range(num_kills):
            time.sleep(_BETWEEN_SECONDS)
            world.node.kill()
            world.node.wait_ready()
        time.sleep(_BETWEEN_SECONDS)
        (after,) = world.engines()
        attempt = world.get_job(job_id).attempt
        world.node.kill()
        world.node.wait_ready()
        world.cancel(job_id)
        world.heal()
        states = world.wait_until_over()
        world.stop()
        same = before == after and attempt == 1
        violations = () if same else (f"{before} became {after} in attempt {attempt}",)
        return [
            *judge(world),
            ended_as_asked(world, states, {job_id: {event_pb2.JOB_STATE_CANCELLED}}),
            *came_back(world),
            Finding(promise="R6", tried=1, held=int(same), violations=violations),
        ]


SCENARIO = Scenario(
    name="adoption",
    promises=("R6", "R8", "R9"),
    num_trials=10,
    trial_seconds=30.0,
    run=run,
)
