"""R12: consumers that stop reading harm nobody: control's memory stays bounded, the others are told within a second,
the engine trains at its pace, and who takes nothing is cut off with a reason within the time that the setting gives."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from itertools import pairwise

import psutil

from tests.faults.crowd import Crowd, CrowdConfig, Seen, percentile
from tests.faults.driver import World, WorldConfig
from tests.faults.driver.services import environment
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2

_NUM_STALLED = 100
_NUM_READING = 200
_STALLED_SECONDS = 60.0
# From the moment in which control can write no more, which is soon after it has begun.
_SLACK_SECONDS = 15.0
_MEMORY_LIMIT_BYTES = 1024**3
_DELIVERY_LIMIT_SECONDS = 1.0
_MIB = 1024**2
# What a reader that was cut off is told.
_CUT = "nothing was taken"
# Of the job that is over: more than a connection takes in by itself.
_HISTORY_STEPS = 12_000
_STEP_SECONDS = 0.02


def run(trial: Trial) -> list[Finding]:
    """The full count, with the time that the product gives a reader by itself."""
    return stall(
        trial, num_stalled=_NUM_STALLED, num_reading=_NUM_READING, stalled_seconds=_STALLED_SECONDS, quiet_seconds=20.0
    )


def stall(
    trial: Trial,
    *,
    num_stalled: int,
    num_reading: int,
    stalled_seconds: float,
    quiet_seconds: float,
    history_steps: int = _HISTORY_STEPS,
) -> list[Finding]:
    """Readers of a live job; some of a job that is over, and some of the live one, who take nothing. The pace of the
    engine is measured for `quiet_seconds` without any of them, and then with them."""
    config = WorldConfig(
        directory=trial.directory, seed=trial.seed, control_flags={"stalled-reader-seconds": stalled_seconds}
    )
    with World(config) as world:
        datasets = [world.upload("rows")]
        script = {"step_seconds": 0.0}
        project_id = world.create_project("over", datasets, script=script, num_steps=history_steps)
        over = world.start_job(project_id, num_consumers=0)
        world.wait_for_state(over, event_pb2.JOB_STATE_SUCCEEDED)
        project_id = world.create_project(
            "live", datasets, script={"step_seconds": _STEP_SECONDS}, num_steps=10_000_000
        )
        live = world.start_job(project_id, num_consumers=0)
        world.wait_for_step(live, 1)
        began = time.time()
        time.sleep(quiet_seconds)
        crowds_came = time.time()
        control = psutil.Process(world.control.pid)
        before_bytes = control.memory_info().rss
        seen, most_bytes = asyncio.run(_watch(world, control, over, live, num_stalled, num_reading, stalled_seconds))
        crowds_left = time.time()
        quiet, crowded = _paces(world.events(live), began, crowds_came, crowds_left)
        world.client.call("CancelJob", job_service_pb2.CancelJobRequest(job_id=live))
        world.wait_until_over()
        world.stop()
    growth_bytes = most_bytes - before_bytes
    stalled, reading = seen
    p99 = percentile(reading.delivery_seconds, 0.99)
    slower = crowded / quiet - 1
    cut = sorted(_cut_seconds(world))
    violations = [f"a reading watch ended with {why}" for why in reading.ended]
    if len(cut) != num_stalled or sum(n for why, n in stalled.ended.items() if _CUT in why) != num_stalled:
        violations.append(f"{len(cut)} of {num_stalled} stalled watches were cut off, with {stalled.ended}")
    if cut and cut[-1] > stalled_seconds + _SLACK_SECONDS:
        violations.append(f"a stalled watch was cut off after {cut[-1]:.0f} s")
    if growth_bytes > _MEMORY_LIMIT_BYTES:
        violations.append(f"control grew by {growth_bytes / _MIB:.0f} MiB")
    if p99 > _DELIVERY_LIMIT_SECONDS:
        violations.append(f"events took {p99:.2f} s (p99) to those who read")
    tried = num_stalled + num_reading
    return [
        Finding(
            promise="R12",
            tried=tried,
            held=tried - min(tried, len(violations)),
            violations=tuple(violations),
            worst=growth_bytes / _MIB,
            unit="MiB",
            what=f"growth of control beside {num_stalled} stalled and {num_reading} reading watchers (delivery p99 "
            f"{p99:.2f} s, cut off after {cut[-1] if cut else 0:.0f} s, step time {slower:+.2%})",
        )
    ]


async def _watch(
    world: World,
    control: psutil.Process,
    over: str,
    live: str,
    num_stalled: int,
    num_reading: int,
    stalled_seconds: float,
) -> tuple[list[Seen], int]:
    """What both crowds saw, and the most memory that control had meanwhile."""
    variables = environment({})
    address = world.control.address
    crowds = [
        await Crowd.start(
            CrowdConfig(address=address, job_id=job_id, num_watchers=number, is_stalled=is_stalled),
            environment=variables,
        )
        for job_id, number, is_stalled in ((over, num_stalled, True), (live, num_reading, False))
    ]
    most_bytes = 0
    try:
        ends_at = time.monotonic() + stalled_seconds + _SLACK_SECONDS
        while time.monotonic() < ends_at:
            most_bytes = max(most_bytes, control.memory_info().rss)
            await asyncio.sleep(0.5)
        return [await crowd.end() for crowd in crowds], most_bytes
    finally:
        for crowd in crowds:
            crowd.kill()


def _cut_seconds(world: World) -> list[float]:
    """How long the watches lasted that control cut off, by its own log."""
    lines = (json.loads(line) for line in world.control.log_file.read_text().splitlines() if line.startswith("{"))
    return [line["seconds"] for line in lines if line.get("reason") == "READER_STALLED"]


def _paces(log: list[event_pb2.Event], began: float, crowds_came: float, crowds_left: float) -> tuple[float, float]:
    """Median seconds between steps by the engine's clock, before the crowds came and with them."""
    times = [event.time.ToNanoseconds() / 1e9 for event in log if event.kind == event_pb2.EVENT_KIND_STEP]
    quiet = [after - before for before, after in pairwise(times) if began < before and after < crowds_came]
    crowded = [after - before for before, after in pairwise(times) if crowds_came < before and after < crowds_left]
    return statistics.median(quiet), statistics.median(crowded)


SCENARIO = Scenario(name="stalled_consumers", promises=("R12",), num_trials=2, trial_seconds=150.0, run=run, alone=True)
