"""Kills or stops whoever comes by a failpoint, at each of them, during all that jobs go through. A failpoint that
nobody came by is a failure of the trial.

A trial arms one of them; `kill_everywhere` arms many in one world, which is what the quick test does.
"""

from __future__ import annotations

import glob
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

from google.protobuf.message import Message

from tests.faults.driver import World, WorldConfig
from tests.faults.driver.failpoints import DECLARED
from tests.faults.driver.verdict import came_back, ended_as_asked, judge
from tests.faults.driver.world import Refused
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2, plan_pb2
from tunesmith.control.v1 import job_service_pb2

SUCCEEDED, CANCELLED = event_pb2.JOB_STATE_SUCCEEDED, event_pb2.JOB_STATE_CANCELLED
FAILED = event_pb2.JOB_STATE_FAILED
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
# Passed once by a process, so that there is no second time to wait for.
_ONCE = _AFTERWARDS | _BACKUPS | {name for name in DECLARED if name.startswith(("bury.", "planned."))}
_ONCE |= {"shim.before-record", "shim.before-exit-record", "shim.after-exit-record", "shim.after-close"}
_DEEP = 3
_NUM_STEPS = 16
_SAVE_EVERY_STEPS = 4
_MAX_ROUNDS = 4
# Some microseconds: whatever is over may be compacted.
_RETENTION_DAYS = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where a trial kills."""

    name: str
    # The time of passing by, from 1, of one process.
    after: int = 1
    # Armed only when this is about to be killed, so that whoever cleans up after it is the next to come by.
    armed_for_end_of: str = ""
    # `kill`, or `stop` for a second.
    action: str = "kill"


# Others than engines write journals, too.
ROLES: Sequence[Site] = [
    Site(name=name, armed_for_end_of=end)
    for name in ("journal.before-append", "journal.before-fsync", "journal.after-append")
    for end in ("engine", "shim")
]
SITES: Sequence[Site] = (
    *(Site(name=name) for name in sorted(DECLARED)),
    *(Site(name=name, after=_DEEP) for name in sorted(set(DECLARED) - _ONCE)),
    *ROLES,
)


# Stopping loses nobody, so that several are tried in one world.
_STOPS = [Site(name=name, action="stop") for name in sorted(set(DECLARED) - _AFTERWARDS - _BACKUPS)]
_NUM_STOP_TRIALS = 8


def run(trial: Trial) -> list[Finding]:
    """One site to die at, or some to stop at, by the seed."""
    number = trial.seed % (len(SITES) + _NUM_STOP_TRIALS)
    sites = [SITES[number]] if number < len(SITES) else _STOPS[number - len(SITES) :: _NUM_STOP_TRIALS]
    return kill_everywhere(trial, sites)


def kill_everywhere(trial: Trial, sites: Collection[Site]) -> list[Finding]:
    """Kills at all these sites while jobs go through all that there is; then heals and checks."""
    names = {site.name for site in sites}
    with World(WorldConfig(directory=trial.directory, seed=trial.seed)) as world:
        datasets = [world.upload("first"), world.upload("second")]
        for site in sites:
            if site.name not in _AFTERWARDS | _BACKUPS and not site.armed_for_end_of:
                world.failpoints.arm(site.name, action=site.action, after=site.after)
        asked: dict[str, set[int]] = {}
        for number in range(_MAX_ROUNDS):
            asked |= _live_through_all(world, number, datasets, sites)
            if not world.failpoints.armed():
                break
        missed = world.heal()
        states = world.wait_until_over()
        _back_up(world, trial.directory / "backup", _BACKUPS & names)
        missed += sorted(names - {name for name, _ in world.failpoints.taken()} - _AFTERWARDS - set(missed))
        assert not missed, f"nobody came by {missed}"
        world.stop()
        findings = [*judge(world), ended_as_asked(world, states, asked)]
        if not any(name.startswith("bury.") for name in names):
            # A burial that is killed is tried again only after a pause.
            findings += came_back(world)
    if later := _AFTERWARDS & names:
        findings += _forget(trial, later, states)
    return findings


def _live_through_all(world: World, number: int, datasets: list[int], sites: Collection[Site]) -> dict[str, set[int]]:
    """Jobs that go on to the end, are paused, cancelled, and lose engine and shim; the states that each may end in."""
    datasets = [*datasets, world.upload(f"round-{number}")]
    gate = world.directory / f"gate-{number}"

    def start(name: str, **holding: object) -> str:
        script = {"step_seconds": 0.01, "keep_checkpoints": 1, **holding}
        project_id = world.create_project(
            f"{name}-{number}", datasets, script=script, num_steps=_NUM_STEPS, save_every_steps=_SAVE_EVERY_STEPS
        )
        _plan(world, project_id)
        return world.start_job(project_id)

    # One after another from here on: a job that waits for the trial must not have the node while another is needed.
    held = {"hold_at": _NUM_STEPS - 2, "until_file": str(gate)}
    plain, cancelled = start("plain"), start("cancelled", **held)
    world.wait_for_step(cancelled, 2)
    world.client.call("CancelJob", job_service_pb2.CancelJobRequest(job_id=cancelled))
    paused = start("paused", **held)
    world.wait_for_step(paused, 2)
    world.wait_for("a pause", lambda: _pause(world, paused))
    bereft = start("bereft", **held)
    world.wait_for_step(bereft, 2)
    _end(world, "engine", bereft, sites)
    attempt = world.get_job(bereft).attempt
    world.wait_for("the next attempt", lambda: _trains_in_attempt(world, bereft, attempt + 1))
    _end(world, "shim", bereft, sites)
    gate.touch()
    world.client.call("ResumeJob", job_service_pb2.ResumeJobRequest(job_id=paused))
    world.wait_until_over()
    # An engine that dies before it hears of the cancel has failed, and that is what is said.
    return {plain: {SUCCEEDED}, paused: {SUCCEEDED}, bereft: {SUCCEEDED}, cancelled: {CANCELLED, FAILED}}


def _end(world: World, target: str, job_id: str, sites: Collection[Site]) -> None:
    for site in sites:
        if site.armed_for_end_of == target:
            world.failpoints.arm(site.name, after=site.after)
    world.signal_engine(signal.SIGKILL, "kill", target=target, job_id=job_id)


def _trains_in_attempt(world: World, job_id: str, attempt: int) -> bool:
    job = world.get_job(job_id)
    is_there = any(one.job_id == job_id for one in world.engines())
    return bool(job.attempt >= attempt and job.state == RUNNING and is_there)


def _plan(world: World, project_id: int) -> None:
    """An exact plan, by a planner that may be killed."""
    request = job_service_pb2.PlanTrainingRequest(project_id=project_id, level=plan_pb2.PLAN_LEVEL_EXACT)
    # The last three: the node, or its planner, was killed over it.
    world.wait_for("a plan", lambda: _is_done(world, "PlanTraining", request, "PLANNING", "NO_NODE", "NO_MODEL"))


def _pause(world: World, job_id: str) -> bool:
    """Asks for a pause unless it is on its way; True when the job is paused. Between two attempts it cannot be."""
    if world.get_job(job_id).state == RUNNING:
        _is_done(world, "PauseJob", job_service_pb2.PauseJobRequest(job_id=job_id), "JOB_STATE")
    return bool(world.get_job(job_id).state == PAUSED)


def _is_done(world: World, method: str, request: Message, *not_now: str) -> bool:
    """Whether a call went well; False when it was refused for one of these reasons."""
    again = type(request)()
    again.CopyFrom(request)
    try:
        world.client.call(method, again, seconds=60.0)
    except Refused as refused:
        if refused.reason not in not_now:
            raise
        return False
    return True


def _back_up(world: World, target: Path, names: Collection[str]) -> None:
    """A backup that is killed is no backup, and says so; made again into the same directory it is one."""
    arguments = ("backup", "--data-directory", str(world.control_directory), "--to", str(target))
    for name in sorted(names):
        world.failpoints.arm(name)
        killed = world.run_chore("control_service", arguments)
        assert killed.returncode == -signal.SIGKILL, f"{name} was not passed: {killed.stderr}"
        refused = _restore(world, target, name)
        assert refused.returncode == 1, f"a backup that died at {name} was restored: {refused.stdout}"
    if names:
        done = world.run_chore("control_service", arguments)
        assert done.returncode == 0, done.stderr
        restored = _restore(world, target, "whole")
        assert restored.returncode == 0, restored.stderr


def _restore(world: World, source: Path, name: str) -> CompletedProcess[str]:
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
        runs = str(world.node_directories["a"] / "runs/*/*")
        world.wait_for("the runs' release", lambda: not glob.glob(runs))  # noqa: PTH207 - a Path's own minds one that goes
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
    num_trials=len(SITES) + _NUM_STOP_TRIALS,
    trial_seconds=12.0,
    run=run,
)
