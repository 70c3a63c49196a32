"""R13: a crowd watches one job that trains, others call, and a probe asks for the service's health: how long the event
loop keeps a call waiting that costs nothing by itself. The figure decides whether the promise held."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.fakes.control import PATIENCE_SECONDS
from tests.faults.crowd import Crowd, CrowdConfig, percentile
from tests.faults.driver.services import environment
from tests.faults.scenario import Finding, Scenario, Trial
from tests.faults.streaming import streaming
from tunesmith.control.v1 import job_service_pb2, project_service_pb2

LIMIT_SECONDS = 0.1
_NUM_WATCHERS = 2000
_CALLS_PER_SECOND = 200.0
_PROBES_PER_SECOND = 20.0
_SECONDS = 60.0
_STEPS_PER_SECOND = 10.0


def run(trial: Trial) -> list[Finding]:
    """The full crowd."""
    return crowd(trial, num_watchers=_NUM_WATCHERS, seconds=_SECONDS)


def crowd(trial: Trial, *, num_watchers: int, seconds: float) -> list[Finding]:
    """So many watchers for so long, with calls and probes beside."""
    return asyncio.run(_crowd(trial, num_watchers, seconds))


async def _crowd(trial: Trial, num_watchers: int, seconds: float) -> list[Finding]:
    # As control has it by itself.
    flags = ("--heartbeat-seconds", "15")
    async with streaming(trial.directory, steps_per_second=_STEPS_PER_SECOND, flags=flags) as world:
        job_id = await world.start_job()
        config = CrowdConfig(address=world.address, job_id=job_id, num_watchers=num_watchers)
        watchers = await Crowd.start(config, environment=environment({}))
        try:
            (calls, failed), probes = await asyncio.gather(
                _call_on(world.address, job_id, seconds), _probe_on(world.address, seconds)
            )
            seen = await watchers.end()
        finally:
            watchers.kill()
    violations = [f"a watch ended with {why} ({count} times)" for why, count in seen.ended.items()]
    violations += failed[:10]
    worst = percentile(probes, 0.99)
    if worst > LIMIT_SECONDS:
        violations.append(f"health took {worst * 1000:.0f} ms (p99)")
    return [
        Finding(
            promise="R13",
            tried=len(probes),
            held=len(probes) if not violations else sum(one <= LIMIT_SECONDS for one in probes),
            violations=tuple(violations),
            worst=worst,
            unit="s",
            what=f"p99 of health beside {num_watchers} watchers and {len(calls) / seconds:.0f} calls a second "
            f"(p99 of calls {percentile(calls, 0.99):.3f} s, of events' delivery "
            f"{percentile(seen.delivery_seconds, 0.99):.2f} s, {seen.num_messages / seconds:.0f} messages a second)",
        )
    ]


async def _call_on(address: str, job_id: str, seconds: float) -> tuple[list[float], list[str]]:
    """Unary calls at an even pace, whatever they take; how long each took, and what failed."""
    took: list[float] = []
    failed: list[str] = []
    running: set[asyncio.Task[None]] = set()
    async with grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        get_job = channel.unary_unary(
            "/tunesmith.control.v1.JobService/GetJob",
            request_serializer=job_service_pb2.GetJobRequest.SerializeToString,
            response_deserializer=job_service_pb2.GetJobResponse.FromString,
        )
        list_projects = channel.unary_unary(
            "/tunesmith.control.v1.ProjectService/ListProjects",
            request_serializer=project_service_pb2.ListProjectsRequest.SerializeToString,
            response_deserializer=project_service_pb2.ListProjectsResponse.FromString,
        )

        async def call(number: int) -> None:
            started = time.monotonic()
            try:
                if number % 2:
                    await get_job(job_service_pb2.GetJobRequest(job_id=job_id), timeout=PATIENCE_SECONDS)
                else:
                    await list_projects(project_service_pb2.ListProjectsRequest(), timeout=PATIENCE_SECONDS)
            except grpc.aio.AioRpcError as error:
                failed.append(f"a call ended {error.code().name}: {error.details()}")
            took.append(time.monotonic() - started)

        start = time.monotonic()
        for number in range(int(seconds * _CALLS_PER_SECOND)):
            await asyncio.sleep(max(0.0, start + number / _CALLS_PER_SECOND - time.monotonic()))
            task = asyncio.create_task(call(number))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
    return took, failed


async def _probe_on(address: str, seconds: float) -> list[float]:
    """Health, over a connection of its own."""
    took: list[float] = []
    async with grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS)
        start = time.monotonic()
        for number in range(int(seconds * _PROBES_PER_SECOND)):
            await asyncio.sleep(max(0.0, start + number / _PROBES_PER_SECOND - time.monotonic()))
            asked = time.monotonic()
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, answer
            took.append(time.monotonic() - asked)
    return took


SCENARIO = Scenario(name="crowd_of_watchers", promises=("R13",), num_trials=2, trial_seconds=110.0, run=run, alone=True)
