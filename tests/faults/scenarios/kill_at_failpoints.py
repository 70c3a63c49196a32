"""Kills whoever comes by a failpoint, at each of them, during everything that jobs go through. A failpoint that nobody
came by is a failure of the trial.

A trial arms one failpoint; `kill_everywhere` arms all of them in one world, which is what the quick test does.
"""

from __future__ import annotations

import signal
from collections.abc import Collection
from pathlib import Path

from tests.faults.driver import World, WorldConfig
from tests.faults.driver.failpoints import DECLARED
from tests.faults.driver.verdict import came_back, ended_as_asked, judge
from tests.faults.driver.world import Refused
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2, plan_pb2
from tunesmith.control.v1 import job_service_pb2

SUCCEEDED, CANCELLED = event_pb2.JOB_STATE_SUCCEEDED, event_pb2.JOB_STATE_CANCELLED
PAUSED, RUNNING = event_pb2.JOB_STATE_PAUSED, event_pb2.JOB_STATE_RUNNING

# Reached once jobs are over and their runs may go.
_AFTERWARDS = frozenset(
    {
        "release.before-release-run",
        "release.after-release-run",
        "discard.before-rename",
        "discard.after-rename",
        "compact.between-transactions",
    }
)
_BACKUPS = frozenset({"backup.before-rename", "backup.after-rename"})
# Each name in every third of its trials: at once, and then deeper in.
_DEPTHS = (1, 2, 5)
_NUM_STEPS = 16
_SAVE_EVERY_STEPS = 4
_MAX_ROUNDS = 4
# Some microseconds: whatever is over may be compacted.
_RETENTION_DAYS = 1e-9


def run(trial: Trial) -> list[Finding]:
    """One failpoint, by the seed."""
    names = sorted(DECLARED)
    name, depth = names[trial.seed % len(names)], _DEPTHS[trial.seed // len(names) % len(_DEPTHS)]
    return kill_everywhere(trial, [name], after=1 if name in _AFTERWARDS | _BACKUPS else depth)


def kill_everywhere(trial: Trial, names: Collection[str], *, after: int = 1) -> list[Finding]:
    """Kills at all these failpoints while jobs go through all that there is; then heals and checks."""
    with World(WorldConfig(directory=trial.directory, seed=trial.seed)) as world:
        datasets = [world.upload("first"), world.upload("second")]
        for name in set(names) - _AFTERWARDS - _BACKUPS:
            world.failpoints.arm(name, after=after)
        asked: dict[str, int] = {}
        for number in range(_MAX_ROUNDS):
            asked |= _live_through_all(world, number, datasets)
            if not world.failpoints.armed():
                break
        missed = world.heal()
        states = world.wait_until_over()
        _back_up(world, trial.directory / "backup", _BACKUPS & set(names))
        assert not missed, f"nobody came by {missed} for the {after}. time"
        world.stop()
        findings = [*judge(world), ended_as_asked(states, asked), *came_back(world)]
    if later := _AFTERWARDS & set(names):
        findings += _forget(trial, later, states)
    return findings


def _live_through_all(world: World, number: int, datasets: list[int]) -> dict[str, int]:
    """Jobs that go on to the end, are paused, cancelled, and lose engine and shim; the state that each is to end in."""
    datasets = [*datasets, world.upload(f"round-{number}")]
    script = {"step_seconds": 0.02, "keep_checkpoints": 1}

    def start(name: str) -> str:
        project_id = world.create_project(
            f"{name}-{number}", datasets, script=script, num_steps=_NUM_STEPS, save_every_steps=_SAVE_EVERY_STEPS
        )
        _plan(world, project_id)
        return world.start_job(project_id)

    plain, paused, cancelled, bereft = (start(name) for name in ("plain", "paused", "cancelled", "bereft"))
    for job_id in (paused, cancelled):
        world.wait_for_step(job_id, 2)
        if job_id == cancelled:
            world.client.call("CancelJob", job_service_pb2.CancelJobRequest(job_id=job_id))
        elif _pause(world, job_id):
            world.client.call("ResumeJob", job_service_pb2.ResumeJobRequest(job_id=job_id))
    world.wait_for_step(bereft, 2)
    world.signal_engine(signal.SIGKILL, "kill", job_id=bereft)
    world.wait_for_state(bereft, RUNNING, SUCCEEDED)
    world.signal_engine(signal.SIGKILL, "kill", target="shim", job_id=bereft)
    states = world.wait_until_over()
    # One that was over before it could be cancelled is as it was.
    asked = dict.fromkeys((plain, paused, bereft), SUCCEEDED)
    return asked | {cancelled: SUCCEEDED if states[cancelled] == SUCCEEDED else CANCELLED}


def _plan(world: World, project_id: int) -> None:
    """An exact plan, by a planner that may be killed."""
    request = job_service_pb2.PlanTrainingRequest(project_id=project_id, level=plan_pb2.PLAN_LEVEL_EXACT)

    def is_planned() -> bool:
        try:
            world.client.call("PlanTraining", request, seconds=60.0)
        except Refused as refused:
            # The node, or its planner, was killed over it.
            assert refused.reason in ("PLANNER_FAILED", "NO_NODE", "NODE_UNAVAILABLE"), refused
            return False
        return True

    world.wait_for("a plan", is_planned)


def _pause(world: World, job_id: str) -> bool:
    """Pauses a job wherever it is; False when it was over first."""

    def is_asked() -> bool:
        if world.get_job(job_id).state == SUCCEEDED:
            return True
        try:
            world.client.call("PauseJob", job_service_pb2.PauseJobRequest(job_id=job_id))
        except Refused as refused:
            # It is between two attempts just now.
            assert refused.reason == "JOB_STATE", refused
            return False
        return True

    world.wait_for("a pause", is_asked)
    return world.wait_for_state(job_id, PAUSED, SUCCEEDED) == PAUSED


def _back_up(world: World, target: Path, names: Collection[str]) -> None:
    """A backup that is killed is no backup, and says so; made again into the same directory it is one."""
    arguments = ("backup", "--data-directory", str(world.control_directory), "--to", str(target))
    for name in sorted(names):
        world.failpoints.arm(name)
        killed = world.run_chore("control_service", arguments)
        assert killed.returncode == -signal.SIGKILL, f"{name} was not passed: {killed.stderr}"
        refused = _restore(world, target, name)
        assert refused.returncode == 1, f"a backup that died at {name} was restored: {refused.stdout}"
    for wanted in (arguments,) if names else ():
        done = world.run_chore("control_service", wanted)
        assert done.returncode == 0, done.stderr
        restored = _restore(world, target, "whole")
        assert restored.returncode == 0, restored.stderr


def _restore(world: World, source: Path, name: str):  # type: ignore[no-untyped-def]
    target = world.directory / f"restored-{name}"
    arguments = ("restore", "--from", str(source), "--data-directory", str(target))
    return world.run_chore("control_service", arguments)


def _forget(trial: Trial, names: Collection[str], states: dict[str, int]) -> list[Finding]:
    """Runs are released and logs compacted, with kills on the way: nothing but them goes."""
    config = WorldConfig(
        directory=trial.directory,
        seed=trial.seed,
        name="afterwards",
        control_flags={"no-release-runs": False, "event-retention-days": _RETENTION_DAYS},
        armed=tuple(sorted(names)),
    )
    with World(config) as world:
        world.wait_for("the failpoints", lambda: not world.failpoints.armed())
        world.wait_for("the runs' release", lambda: not [*world.node_directories["a"].glob("runs/*/*")])
        world.wait_for("compaction", lambda: all(_is_compacted(world, job_id) for job_id in states))
        changed = [job_id for job_id, state in states.items() if world.get_job(job_id).state != state]
        world.stop()
    return [
        Finding(
            promise="R11",
            tried=len(states),
            held=len(states) - len(changed),
            violations=tuple(f"job {job_id} changed its state when its log was compacted" for job_id in changed),
        )
    ]


def _is_compacted(world: World, job_id: str) -> bool:
    try:
        return not world.events(job_id)
    except Refused as refused:
        return refused.reason == "HISTORY_COMPACTED"


SCENARIO = Scenario(
    name="kill_at_failpoints",
    promises=("R1", "R2", "R4", "R6", "R7", "R8", "R9", "R11", "R19"),
    num_trials=len(DECLARED) * len(_DEPTHS),
    trial_seconds=12.0,
    run=run,
)
