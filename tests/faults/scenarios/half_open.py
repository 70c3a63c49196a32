"""R27: a link that swallows everything without a word. With the settings that the product has by itself, each side
notices within a minute, the service frees the place of the watch, and the streams go on over a new link."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc

from tests.faults.scenario import Finding, Scenario, Trial
from tests.faults.streaming import digest_of, streaming
from tests.faults.tcp_proxy import TcpProxy
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith_client import AsyncClient, ClientConfig

LIMIT_SECONDS = 60.0
_GIVE_UP_SECONDS = 150.0
# Of the watch that is cut off, and one more.
_MAX_WATCHES = 2


def run(trial: Trial) -> list[Finding]:
    """Both links, one after the other."""
    return asyncio.run(_run(trial))


async def _run(trial: Trial) -> list[Finding]:
    seconds: dict[str, float] = {}
    flags = ("--max-watches", str(_MAX_WATCHES), "--heartbeat-seconds", "15", "--node-heartbeat-seconds", "5")
    async with (
        streaming(trial.directory, steps_per_second=5.0, flags=flags) as world,
        TcpProxy.to(world.address) as link,
    ):
        job_id = await world.start_job()
        given: list[event_pb2.Event] = []

        async def consume() -> None:
            async with AsyncClient(config=ClientConfig(address=link.address)) as client:
                async for event in client.jobs.watch(job_id):
                    given.append(event)

        consumer = asyncio.create_task(consume())
        await _until(lambda: len(given) > 20)
        link.link.black_hole = True
        accepted, ended = link.num_accepted, link.num_ended_by_upstream
        started = time.monotonic()
        noticing = [
            _note(seconds, "the client", started, lambda: link.num_accepted > accepted),
            _note(seconds, "control, of a client", started, lambda: link.num_ended_by_upstream > ended),
            _note_place(seconds, "control's place for a watch", started, world.address, job_id),
        ]
        await asyncio.gather(*noticing)
        link.link.black_hole = False
        link.reset_all()
        reached = len(given)
        await _until(lambda: len(given) > reached)

        world.link.link.black_hole = True
        accepted, ended = world.link.num_accepted, world.link.num_ended_by_upstream
        started = time.monotonic()
        await asyncio.gather(
            _note(seconds, "control, of a node", started, lambda: world.link.num_accepted > accepted),
            _note(seconds, "the node", started, lambda: world.link.num_ended_by_upstream > ended),
        )
        world.link.link.black_hole = False
        world.link.reset_all()
        reached = len(given)
        await _until(lambda: len(given) > reached)
        await world.cancel_job()
        async with asyncio.timeout(_GIVE_UP_SECONDS):
            await consumer
        log = await world.log()
    violations = [f"{who} noticed after {took:.0f} s" for who, took in seconds.items() if took > LIMIT_SECONDS]
    if digest_of(given) != digest_of(log):
        violations.append(f"{len(given)} events were given that are not the log's {len(log)}")
    tried = len(seconds) + 1
    return [
        Finding(
            promise="R27",
            tried=tried,
            held=tried - len(violations),
            violations=tuple(violations),
            worst=max(seconds.values()),
            unit="s",
            what="until the last side noticed: " + ", ".join(f"{who} {took:.0f} s" for who, took in seconds.items()),
        )
    ]


async def _note(seconds: dict[str, float], who: str, started: float, has_noticed: Callable[[], bool]) -> None:
    await _until(has_noticed)
    seconds[who] = time.monotonic() - started


async def _note_place(seconds: dict[str, float], who: str, started: float, address: str, job_id: str) -> None:
    """Until as many watches can be opened as there may be."""
    async with grpc.aio.insecure_channel(address) as channel:
        watch = channel.unary_stream(
            "/tunesmith.control.v1.JobService/WatchJob",
            request_serializer=job_service_pb2.WatchJobRequest.SerializeToString,
            response_deserializer=job_service_pb2.WatchJobResponse.FromString,
        )
        while True:
            calls = [watch(job_service_pb2.WatchJobRequest(job_id=job_id)) for _ in range(_MAX_WATCHES)]
            try:
                await asyncio.gather(*(call.read() for call in calls))
                break
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > started + 150.0:
                    raise
                await asyncio.sleep(0.5)
            finally:
                for call in calls:
                    call.cancel()
        seconds[who] = time.monotonic() - started


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(_GIVE_UP_SECONDS):
        while not condition():  # noqa: ASYNC110 - nothing tells a trial of it
            await asyncio.sleep(0.05)


SCENARIO = Scenario(name="half_open", promises=("R27",), num_trials=2, trial_seconds=120.0, run=run)
