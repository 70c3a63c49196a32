"""R8: the GPU server is killed again and again just after it sent events of a run, before it knows that they arrived;
control is killed between reading them and storing them. The log stays 1..n, each event once, as the journal has it."""

from __future__ import annotations

from tests.faults.driver import World, WorldConfig
from tests.faults.driver.services import Service
from tests.faults.driver.verdict import judge
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.control.v1 import job_service_pb2

SENDER, RECEIVER = "watch-run.after-send", "ingest.before-commit"
_NUM_SENDER_KILLS = 50
_NUM_RECEIVER_KILLS = 10
# More than it ever gets to: the job is cancelled once the kills are done.
_NUM_STEPS = 1_000_000


def run(trial: Trial) -> list[Finding]:
    """All kills of a trial, over one job."""
    return kill_senders(trial, num_sender_kills=_NUM_SENDER_KILLS, num_receiver_kills=_NUM_RECEIVER_KILLS)


def kill_senders(trial: Trial, *, num_sender_kills: int, num_receiver_kills: int) -> list[Finding]:
    """Kills in random order while one job trains, then ends the job and has everything checked."""
    with World(WorldConfig(directory=trial.directory, seed=trial.seed)) as world:
        project_id = world.create_project(
            "sent", [world.upload("rows")], script={"step_seconds": 0.02}, num_steps=_NUM_STEPS, save_every_steps=0
        )
        job_id = world.start_job(project_id)
        world.wait_for_step(job_id, 1)
        kills = [SENDER] * num_sender_kills + [RECEIVER] * num_receiver_kills
        world.random.shuffle(kills)
        for name in kills:
            _kill_at(world, name)
        reached = world.get_job(job_id).progress.step
        world.wait_for_step(job_id, reached + 1)
        world.client.call("CancelJob", job_service_pb2.CancelJobRequest(job_id=job_id))
        world.heal()
        world.wait_until_over()
        world.stop()
        findings = judge(world)
    # R8 counts kills; what else the checker decides stands for itself.
    violations = [text for finding in findings if finding.promise == "R8" for text in finding.violations]
    others = [finding for finding in findings if finding.promise != "R8"]
    held = 0 if violations else len(kills)
    return [Finding(promise="R8", tried=len(kills), held=held, violations=tuple(violations)), *others]


def _kill_at(world: World, name: str) -> None:
    """Has one process die there, and waits until its successor serves."""
    service: Service = world.node if name == SENDER else world.control
    service.wait_ready()
    pid = service.pid
    world.failpoints.arm(name, after=world.random.randint(1, 5))
    taken = world.failpoints.directory / "taken" / f"{name}.{pid}"
    world.wait_for(f"a death at {name}", taken.exists)
    world.wait_for(f"another {service.name}", lambda: service.pid != pid)
    service.wait_ready()


SCENARIO = Scenario(name="sender_kills", promises=("R8", "R9", "R5", "R6"), num_trials=20, trial_seconds=110.0, run=run)
