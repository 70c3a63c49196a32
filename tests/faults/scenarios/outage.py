"""Control is gone for some seconds while a job trains: nothing of the training notices, and nothing is missing (R5)."""

from __future__ import annotations

import itertools
import statistics
import time

from tests.faults.driver import World, WorldConfig
from tests.faults.driver.verdict import ended_as_asked, judge
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2

_STEP_SECONDS = 0.02
_MARGIN_SECONDS = 0.3
_LIMIT = 0.02


def run(trial: Trial) -> list[Finding]:
    """At its full length."""
    return go_out(trial)


def go_out(trial: Trial, *, outage_seconds: float = 6.0, num_steps: int = 700) -> list[Finding]:
    """One outage in the middle of one job."""
    with World(WorldConfig(directory=trial.directory, seed=trial.seed)) as world:
        script = {"step_seconds": _STEP_SECONDS}
        project_id = world.create_project(
            "outage", [world.upload("rows")], script=script, num_steps=num_steps, save_every_steps=200
        )
        job_id = world.start_job(project_id, num_consumers=2)
        world.wait_for_step(job_id, num_steps // 5)
        gone_at = time.time()
        world.control.kill(hold=True)
        time.sleep(outage_seconds)
        back_at = time.time()
        world.heal()
        states = world.wait_until_over()
        events = world.events(job_id)
        attempts = {event.attempt for event in events if event.run_sequence}
        steps = [event for event in events if event.kind == event_pb2.EVENT_KIND_STEP]
        world.stop()
        ended = ended_as_asked(world, states, {job_id: {event_pb2.JOB_STATE_SUCCEEDED}})
        return [*judge(world), ended, *_compare(steps, attempts, num_steps=num_steps, gone_at=gone_at, back_at=back_at)]


def _compare(
    steps: list[event_pb2.Event], attempts: set[int], *, num_steps: int, gone_at: float, back_at: float
) -> list[Finding]:
    """Step times by the engine's own clock, before and in the outage; the steps themselves."""
    violations = []
    numbers = [event.payload.step.step for event in steps]
    if numbers != list(range(1, num_steps + 1)) or attempts != {1}:
        violations.append(f"the log has {len(numbers)} steps in attempts {sorted(attempts)}")
    times = [event.time.ToNanoseconds() / 1e9 for event in steps]
    before = _gaps([at for at in times if at < gone_at])
    during = _gaps([at for at in times if gone_at + _MARGIN_SECONDS < at < back_at - _MARGIN_SECONDS])
    # A quartile: what else the machine does at the time is not the outage's doing.
    slower = statistics.quantiles(during, n=4)[0] / statistics.quantiles(before, n=4)[0] - 1
    if slower > _LIMIT:
        violations.append(f"steps took {slower:.1%} longer while control was gone")
    finding = Finding(
        promise="R5",
        tried=2,
        held=2 - len(violations),
        violations=tuple(violations),
        worst=round(100 * slower, 3),
        unit="%",
        what="longer steps while control is gone",
    )
    return [finding]


def _gaps(times: list[float]) -> list[float]:
    assert len(times) > 20, f"only {len(times)} steps were made in a time that is to be compared"
    return [after - before for before, after in itertools.pairwise(times)]


SCENARIO = Scenario(
    name="outage",
    promises=("R5", "R7", "R8", "R9"),
    num_trials=6,
    trial_seconds=25.0,
    run=run,
)
