"""Kills and stops whatever runs, at random times, while jobs run on two nodes and consumers follow them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

from tests.faults.driver import CONTROL, World, WorldConfig
from tests.faults.driver.verdict import came_back, ended_as_asked, judge
from tests.faults.driver.world import Refused
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2

SUCCEEDED, CANCELLED, FAILED = (
    event_pb2.JOB_STATE_SUCCEEDED,
    event_pb2.JOB_STATE_CANCELLED,
    event_pb2.JOB_STATE_FAILED,
)
_NODES = ("a", "b")
_NUM_JOBS = 4
_NUM_CONSUMERS = 2
# Longer than a killed GPU server may take to be back with its engines (10 s) and to be dialed again: what lapses in the
# meantime is rightly given to the other node, and no adoption could be asked for.
_LEASE_SECONDS = 18.0
_MAX_PAUSE_SECONDS = 1.0
_MAX_STOP_SECONDS = 1.5


def run(trial: Trial) -> list[Finding]:
    """At the full number of faults."""
    return kill_at_random(trial)


def kill_at_random(trial: Trial, *, num_faults: int = 20, num_steps: int = 120) -> list[Finding]:
    """Everything that is random is the seed's; what it meets is the machine's."""
    config = WorldConfig(
        directory=trial.directory,
        seed=trial.seed,
        nodes=_NODES,
        control_flags={"node-lease-seconds": _LEASE_SECONDS},
    )
    with World(config) as world:
        dataset_id = world.upload("rows")
        script = {"step_seconds": 0.04, "keep_checkpoints": 2}
        jobs = []
        for number in range(_NUM_JOBS):
            project_id = world.create_project(
                f"job-{number}", [dataset_id], script=script, num_steps=num_steps, save_every_steps=10
            )
            jobs.append(world.start_job(project_id, num_consumers=_NUM_CONSUMERS))
        asked: dict[str, set[int]] = {job_id: {SUCCEEDED} for job_id in jobs}
        for number in range(num_faults):
            time.sleep(world.random.uniform(0.05, _MAX_PAUSE_SECONDS))
            world.random.choice(_FAULTS)(world)
            if number == num_faults // 2:
                # A cancel in the midst of it all; an engine that dies first has failed, and what succeeded has.
                world.client.call("CancelJob", job_service_pb2.CancelJobRequest(job_id=jobs[-1]))
                asked[jobs[-1]] = {CANCELLED, FAILED, SUCCEEDED}
            if number == num_faults // 3:
                _pause_and_resume(world, jobs[-2])
        world.heal()
        _resume_if_paused(world, jobs)
        states = world.wait_until_over()
        world.stop()
        return [*judge(world), ended_as_asked(world, states, asked), *came_back(world)]


def _kill_control(world: World) -> None:
    world.control.kill()


def _kill_control_for_a_while(world: World) -> None:
    world.control.kill(hold=True)
    time.sleep(world.random.uniform(0.1, _MAX_STOP_SECONDS))
    world.control.release()


def _kill_node(world: World) -> None:
    world.services[world.random.choice(_NODES)].kill()


def _kill_engine(world: World) -> None:
    world.signal_engine(signal.SIGKILL, "kill")


def _kill_shim(world: World) -> None:
    world.signal_engine(signal.SIGKILL, "kill", target="shim")


def _stop_service(world: World) -> None:
    world.stop_service(world.random.choice([CONTROL, *_NODES]))
    time.sleep(world.random.uniform(0.1, _MAX_STOP_SECONDS))
    world.continue_all()


def _stop_node_beyond_its_lease(world: World) -> None:
    world.stop_service(world.random.choice(_NODES))
    time.sleep(_LEASE_SECONDS + world.random.uniform(0.5, 2.0))
    world.continue_all()


def _stop_engine(world: World) -> None:
    world.signal_engine(signal.SIGSTOP, "stop", target=world.random.choice(["engine", "shim"]))
    time.sleep(world.random.uniform(0.1, _MAX_STOP_SECONDS))
    world.continue_all()


# As often as they stand here.
_FAULTS: Sequence[Callable[[World], None]] = (
    _kill_control,
    _kill_control,
    _kill_control_for_a_while,
    _kill_node,
    _kill_node,
    _kill_node,
    _kill_engine,
    _kill_engine,
    _kill_engine,
    _kill_shim,
    _stop_service,
    _stop_engine,
    _stop_node_beyond_its_lease,
)


def _pause_and_resume(world: World, job_id: str) -> None:
    """Asks for both, whatever the job is at; whoever is refused asks no more."""
    for method, request in (
        ("PauseJob", job_service_pb2.PauseJobRequest(job_id=job_id)),
        ("ResumeJob", job_service_pb2.ResumeJobRequest(job_id=job_id)),
    ):
        try:
            world.client.call(method, request)
        except Refused as refused:
            if refused.reason != "JOB_STATE":
                raise


def _resume_if_paused(world: World, jobs: Sequence[str]) -> None:
    for job_id in jobs:
        state = world.wait_for_state(job_id, *(set(event_pb2.JobState.values()) - {event_pb2.JOB_STATE_PAUSING}))
        if state == event_pb2.JOB_STATE_PAUSED:
            world.client.call("ResumeJob", job_service_pb2.ResumeJobRequest(job_id=job_id))


SCENARIO = Scenario(
    name="kill_random",
    promises=("R1", "R3", "R4", "R6", "R7", "R8", "R9", "R19"),
    num_trials=30,
    trial_seconds=70.0,
    run=run,
)
