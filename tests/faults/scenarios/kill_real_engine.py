"""Real training of a tiny model on the CPU, killed at random steps and in the middle of what it writes: the result is
the uninterrupted run's, to the last bit (R20, R19, R7)."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.faults.driver import World, WorldConfig
from tests.faults.driver.verdict import came_back, ended_as_asked, judge
from tests.faults.driver.world import OVER
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2, training_spec_pb2

_NUM_STEPS = 100
# The last step that a kill waits for: behind it the run must still last long enough to be hit.
_LAST_KILL_STEP = 60
_SAVE_EVERY_STEPS = 10
_NUM_JOBS = 3
# Of each job: at random steps, and then once at one of the places below.
_NUM_ENGINE_KILLS = 2
_FAILPOINTS = (
    "checkpoint.before-manifest",
    "staged.before-rename",
    "staged.after-rename",
    "checkpoint.before-event",
    "deleted.after-rename",
    "artifacts.before-manifest",
    "artifacts.before-event",
    "ending.before-terminal",
    "ending.after-terminal",
    "journal.before-fsync",
)
_TRAINING_TYPES = ("lora", "qlora", "full")
_WEIGHTS: Mapping[str, str] = {"lora": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}
_TRAINING_SECONDS = 300.0


def run(trial: Trial) -> list[Finding]:
    """One quiet job, then the same again with kills."""
    training_type = _TRAINING_TYPES[trial.seed % len(_TRAINING_TYPES)]
    with World(WorldConfig(directory=trial.directory, seed=trial.seed, real_engine=True)) as world:
        project_id = world.create_project(
            "training",
            [world.upload("first"), world.upload("second")],
            training_type=training_type,
            num_steps=_NUM_STEPS,
            save_every_steps=_SAVE_EVERY_STEPS,
            keep_checkpoints=2,
            max_length=64,
            batch=training_spec_pb2.Batch(examples=4),
            lora=None if training_type == "full" else training_spec_pb2.Lora(rank=4, dropout=0.1),
        )
        quiet = world.start_job(project_id)
        world.wait_for_state(quiet, *OVER, seconds=_TRAINING_SECONDS)
        killed = []
        for number in range(_NUM_JOBS):
            job_id = world.start_job(project_id)
            killed.append(job_id)
            _kill_often(world, job_id, number + trial.seed * _NUM_JOBS)
        world.heal()
        states = world.wait_until_over(seconds=_TRAINING_SECONDS)
        results = {job_id: _result(world, job_id, training_type) for job_id in world.job_ids}
        world.stop()
        ended = ended_as_asked(world, states, {job_id: {event_pb2.JOB_STATE_SUCCEEDED} for job_id in world.job_ids})
        return [*judge(world), ended, *came_back(world), _compare(results, quiet, killed)]


def _kill_often(world: World, job_id: str, number: int) -> None:
    """Engine, server, control and shim, each at a step that nobody chose, and once at a failpoint."""
    failpoint = _FAILPOINTS[number % len(_FAILPOINTS)]
    taken = world.failpoints.taken_paths(failpoint)
    if failpoint.startswith("planned."):
        world.failpoints.arm(failpoint)
    attempt = 0
    for kill in range(_NUM_ENGINE_KILLS):
        step = world.random.randint(1, _LAST_KILL_STEP)
        attempt = _wait_for_training(world, job_id, step, after_attempt=attempt)
        if world.random.random() < 0.5:
            world.control.kill()
        if world.random.random() < 0.5:
            world.node.kill()
        target = "shim" if kill == 0 and number % 3 == 0 else "engine"
        world.signal_engine(signal.SIGKILL, "kill", target=target, job_id=job_id)
    if world.failpoints.taken_paths(failpoint) == taken and failpoint not in world.failpoints.armed():
        world.failpoints.arm(failpoint)
    world.wait_for_state(job_id, *OVER, seconds=_TRAINING_SECONDS)


def _wait_for_training(world: World, job_id: str, step: int, *, after_attempt: int) -> int:
    """Until a later attempt trains and is at the step, or the job is over; gives the attempt."""

    def trains() -> int:
        job = world.get_job(job_id)
        if job.state in OVER:
            return int(job.attempt)
        has_engine = any(one.job_id == job_id and one.attempt == job.attempt for one in world.engines())
        return int(job.attempt) if job.attempt > after_attempt and job.progress.step >= step and has_engine else 0

    return world.wait_for(f"step {step}", trains, seconds=_TRAINING_SECONDS)


def _result(world: World, job_id: str, training_type: str) -> Mapping[str, Any]:
    """Loss by step, as the log tells it, and the hash of what was trained."""
    losses: dict[int, float] = {}
    for event in world.events(job_id):
        if event.kind == event_pb2.EVENT_KIND_STEP:
            # What a later attempt trained again replaces what was lost.
            losses[event.payload.step.step] = event.payload.step.loss
    weights = _WEIGHTS.get(training_type, _WEIGHTS["lora"])
    file: Path = world.control_directory / "output" / "training" / job_id / weights
    return {"losses": losses, "weights": hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "none"}


def _compare(results: Mapping[str, Mapping[str, Any]], quiet: str, killed: list[str]) -> Finding:
    expected = results[quiet]
    violations = []
    if sorted(expected["losses"]) != list(range(1, _NUM_STEPS + 1)) or expected["weights"] == "none":
        violations.append(f"the uninterrupted run has {len(expected['losses'])} steps")
    for job_id in killed:
        for what in ("losses", "weights"):
            if results[job_id][what] != expected[what]:
                violations.append(f"job {job_id} has other {what} than the uninterrupted run")
    tried = 1 + 2 * len(killed)
    return Finding(promise="R20", tried=tried, held=tried - len(violations), violations=tuple(violations))


SCENARIO = Scenario(
    name="kill_real_engine",
    promises=("R4", "R6", "R7", "R8", "R9", "R19", "R20"),
    num_trials=9,
    trial_seconds=180.0,
    run=run,
    real_engine=True,
)
