"""Real engines beside trouble: what a run's steps take while the one beside it fails in each way (R18), and while 200
read its job and one never reads (R12). Medians over hundreds of steps; each measured run has a core of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.fakes.failure_order import ORDER_FILE
from tests.fakes.gpu_server import GpuServer
from tests.faults.crowd import Crowd, CrowdConfig
from tests.faults.driver import World, WorldConfig
from tests.faults.driver.services import environment
from tests.faults.nodes import running_node
from tests.faults.scenario import Finding, Scenario, Trial
from tests.faults.step_times import StepTimes, pin, slower_by, split_cores
from tunesmith.common.v1 import errors_pb2, event_pb2, training_spec_pb2
from tunesmith.control.v1 import job_service_pb2

_NEIGHBOR_LIMIT = 0.05
_READERS_LIMIT = 0.02
_NUM_READERS = 200
_NUM_STEPS = 200
# So many that no run ends by itself, and few enough to be planned at once.
_ENDLESS = 100_000
_HANG_LIMIT_SECONDS = 30.0
_PATIENCE_SECONDS = 300.0
_TOO_FEW = "it takes four processor cores, of which two a run's own"


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a real engine fails: by a signal, or by what the file `fail` says; and what the failure must say."""

    reason: str
    number: signal.Signals | None = None
    fields: Mapping[str, Any]


WAYS: Mapping[str, Way] = {
    "segmentation-fault": Way(number=signal.SIGSEGV, reason="ENGINE_KILLED", fields={"signal": 11}),
    "abort": Way(number=signal.SIGABRT, reason="ENGINE_KILLED", fields={"signal": 6}),
    "kill": Way(number=signal.SIGKILL, reason="ENGINE_KILLED", fields={"signal": 9}),
    "hang": Way(number=signal.SIGSTOP, reason="HANG", fields={"signal": 9}),
    "exit": Way(reason="ENGINE_EXITED", fields={"exit_status": 7}),
    "exception": Way(reason="TRAINING", fields={"exception_type": "ArithmeticError"}),
    "host-memory": Way(reason="HOST_OUT_OF_MEMORY", fields={"exception_type": "MemoryError"}),
    "device-memory": Way(reason="DEVICE_OUT_OF_MEMORY", fields={}),
    "not-finite": Way(reason="NON_FINITE_LOSS", fields={}),
}


def fail_beside(trial: Trial, *, num_steps: int, ways: Mapping[str, Way] = WAYS) -> Finding:
    """Two engines of one node that train; one fails, again and again, and the other's steps are measured."""
    cores = split_cores(2)
    if cores is None:
        return Finding(promise="R18", tried=0, held=0, skipped=_TOO_FEW)
    (own, victims), others = cores
    slower: dict[str, float] = {}
    problems: list[str] = []
    with running_node(
        trial.directory / "failing",
        real_engine="tests.fakes.host_engine",
        fake_devices=True,
        watch_seconds=_PATIENCE_SECONDS,
        hang_limit_seconds=_HANG_LIMIT_SECONDS,
    ) as server:
        # What the node starts is beside it, until it is put elsewhere.
        pin(server.pid, others)
        neighbor = StepTimes(server.run_directory("01NEIGHBOR"))
        pin(_start(server, "01NEIGHBOR"), own)
        for way, expected in ways.items():
            job_id = f"01FAIL{list(ways).index(way)}"
            engine_pid = _start(server, job_id)
            pin(engine_pid, victims)
            began = time.time()
            neighbor.wait_for(num_steps, seconds=_PATIENCE_SECONDS)
            failed = time.time()
            if expected.number is not None:
                os.kill(engine_pid, expected.number)
            else:
                (server.run_directory(job_id) / ORDER_FILE).write_text(way)
            problems += _named_wrong(server, job_id, way, expected)
            neighbor.wait_for(num_steps, seconds=_PATIENCE_SECONDS)
            slower[way] = slower_by(neighbor.between(began, failed), neighbor.between(failed, time.time()))
        if server.get_run("01NEIGHBOR").state != event_pb2.RUN_STATE_RUNNING:
            problems.append("the neighbor did not go on")
    problems += [f"{way}: the neighbor's steps took {part:+.1%}" for way, part in slower.items() if _is_slow(part)]
    worst = max(slower, key=lambda way: slower[way])
    tried = 2 * len(ways) + 1
    return Finding(
        promise="R18",
        tried=tried,
        held=tried - min(tried, len(problems)),
        violations=tuple(problems),
        worst=100 * slower[worst],
        unit="%",
        what=f"by which a neighbor's median step took longer, at {worst}, with real engines",
    )


def _is_slow(part: float) -> bool:
    return part > _NEIGHBOR_LIMIT


def _start(server: GpuServer, job_id: str) -> int:
    """A run that trains; its engine's process id."""
    server.start_run(job_id, num_steps=_ENDLESS)
    server.wait_for_step(20, job_id)
    directory = str(server.run_directory(job_id))
    (pid,) = [shim["engine_pid"] for shim in server.shims() if shim["run_directory"] == directory]
    return int(pid)


def _named_wrong(server: GpuServer, job_id: str, way: str, expected: Way) -> list[str]:
    events = server.watch_to_end(job_id)
    failure = events[-1].run_state.failure
    name = errors_pb2.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
    found = {field: getattr(failure, field) for field in expected.fields}
    right = events[-1].run_state.state == event_pb2.RUN_STATE_FAILED
    if right and name == expected.reason and found == expected.fields:
        return []
    return [f"{way}: named {name} with {found}"]


def read_beside(trial: Trial, *, num_steps: int, num_readers: int = _NUM_READERS) -> Finding:
    """One real training, first alone, then with readers of its job and one who takes nothing."""
    cores = split_cores(1)
    if cores is None:
        return Finding(promise="R12", tried=0, held=0, skipped=_TOO_FEW)
    ([own], others) = cores
    with World(WorldConfig(directory=trial.directory / "read", seed=trial.seed, real_engine=True)) as world:
        # What this process starts from now on, the crowd too, is beside the engine.
        pin(os.getpid(), others)
        for service in (world.control, world.node):
            pin(service.pid, others)
        project_id = world.create_project(
            "read",
            [world.upload("rows")],
            num_steps=_ENDLESS,
            max_length=64,
            batch=training_spec_pb2.Batch(examples=4),
            lora=training_spec_pb2.Lora(rank=4),
        )
        job_id = world.start_job(project_id, num_consumers=0)
        world.wait_for_step(job_id, 20)
        (engine,) = [one for one in world.engines() if one.job_id == job_id]
        pin(engine.engine_pid, own)
        times = StepTimes(world.node_directories["a"] / "runs" / job_id / "1")
        began = time.time()
        times.wait_for(num_steps, seconds=_PATIENCE_SECONDS)
        alone_until = time.time()
        ended, read_from, read_until = asyncio.run(_read(world, job_id, times, num_steps, num_readers))
        world.client.call("CancelJob", job_service_pb2.CancelJobRequest(job_id=job_id))
        world.wait_until_over()
        world.stop()
    slower = slower_by(times.between(began, alone_until), times.between(read_from, read_until))
    violations = [f"a reading watch ended with {why}" for why in ended]
    if slower > _READERS_LIMIT:
        violations.append(f"steps took {slower:+.1%} beside {num_readers} readers")
    return Finding(
        promise="R12",
        tried=num_readers + 1,
        held=num_readers + 1 - len(violations),
        violations=tuple(violations),
        worst=100 * slower,
        unit="%",
        what=f"by which the median step of a real training took longer beside {num_readers} readers and one that "
        "never reads",
    )


async def _read(
    world: World, job_id: str, times: StepTimes, num_steps: int, num_readers: int
) -> tuple[dict[str, int], float, float]:
    """How watches of readers ended, and from when to when all of them read."""
    crowds = [
        await Crowd.start(
            CrowdConfig(address=world.control.address, job_id=job_id, num_watchers=number, is_stalled=is_stalled),
            environment=environment({}),
        )
        for number, is_stalled in ((num_readers, False), (1, True))
    ]
    try:
        read_from = time.time()
        await asyncio.to_thread(times.wait_for, num_steps, seconds=_PATIENCE_SECONDS)
        read_until = time.time()
        seen = [await crowd.end() for crowd in crowds]
    finally:
        for crowd in crowds:
            crowd.kill()
    return seen[0].ended, read_from, read_until


def _run(trial: Trial) -> list[Finding]:
    return [fail_beside(trial, num_steps=_NUM_STEPS), read_beside(trial, num_steps=_NUM_STEPS)]


SCENARIO = Scenario(
    name="neighbors",
    promises=("R12", "R18"),
    num_trials=2,
    trial_seconds=300.0,
    run=_run,
    real_engine=True,
    alone=True,
)
