"""Every trouble that a link has (late, reset, swallowed, half-closed, slow), between client and control and between
control and a node, while a job trains: a consumer is given the log, once and in order, and the job is not moved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from tests.faults.scenario import Finding, Scenario, Trial
from tests.faults.streaming import Streaming, client_config, digest_of, streaming
from tests.faults.tcp_proxy import TcpProxy
from tunesmith.common.v1 import event_pb2
from tunesmith_client import AsyncClient

_NUM_ROUNDS = 3
_TROUBLE_SECONDS = 4.0
_PATIENCE_SECONDS = 120.0


async def _late(proxy: TcpProxy, seconds: float) -> None:
    proxy.link.delay_seconds = 0.3
    await asyncio.sleep(seconds)


async def _reset(proxy: TcpProxy, seconds: float) -> None:
    for _ in range(8):
        proxy.reset_all()
        await asyncio.sleep(seconds / 8)


async def _swallowed(proxy: TcpProxy, seconds: float) -> None:
    proxy.link.black_hole = True
    await asyncio.sleep(seconds)
    # What was swallowed is gone; a link that has lost bytes never works again.
    proxy.reset_all()


async def _half_closed(proxy: TcpProxy, seconds: float) -> None:
    for _ in range(4):
        proxy.half_close_all()
        await asyncio.sleep(seconds / 4)


async def _slow(proxy: TcpProxy, seconds: float) -> None:
    proxy.link.drip_bytes_per_second = 2_000
    await asyncio.sleep(seconds)


TROUBLES: Mapping[str, Callable[[TcpProxy, float], Awaitable[None]]] = {
    "late": _late,
    "reset": _reset,
    "swallowed": _swallowed,
    "half-closed": _half_closed,
    "slow": _slow,
}


def run(trial: Trial) -> list[Finding]:
    """Some rounds of all troubles on both links."""
    return break_links(trial, num_rounds=_NUM_ROUNDS, trouble_seconds=_TROUBLE_SECONDS)


def break_links(trial: Trial, *, num_rounds: int, trouble_seconds: float) -> list[Finding]:
    """One job, one consumer, and each trouble on each of its links."""
    return asyncio.run(_break_links(trial, num_rounds, trouble_seconds))


async def _break_links(trial: Trial, num_rounds: int, trouble_seconds: float) -> list[Finding]:
    violations: list[str] = []
    tried, worst = 0, 0.0
    async with streaming(trial.directory, steps_per_second=50.0) as world, TcpProxy.to(world.address) as front:
        job_id = await world.start_job()
        given: list[event_pb2.Event] = []

        async def consume() -> None:
            async with AsyncClient(config=client_config(front.address)) as client:
                async for event in client.jobs.watch(job_id):
                    given.append(event)

        consumer = asyncio.create_task(consume())
        await _goes_on(given)
        for _ in range(num_rounds):
            for name, trouble in TROUBLES.items():
                for where, proxy in (("client and control", front), ("control and node", world.link)):
                    tried += 1
                    await trouble(proxy, trouble_seconds)
                    proxy.link.delay_seconds = proxy.link.drip_bytes_per_second = 0.0
                    proxy.link.black_hole = False
                    try:
                        worst = max(worst, await _goes_on(given))
                    except TimeoutError:
                        violations.append(f"after a link that was {name} between {where} nothing came any more")
        await world.cancel_job()
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await consumer
        violations += await _judge(world, given)
    return [
        Finding(
            promise="R9",
            tried=tried,
            held=tried - min(tried, len(violations)),
            violations=tuple(violations),
            worst=worst,
            unit="s",
            what="from a mended link to the next event",
        )
    ]


async def _goes_on(given: list[event_pb2.Event]) -> float:
    """Seconds until the consumer is given another event."""
    started, reached = time.monotonic(), len(given)
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while len(given) == reached:  # noqa: ASYNC110 - nothing tells a trial of it
            await asyncio.sleep(0.02)
    return time.monotonic() - started


async def _judge(world: Streaming, given: list[event_pb2.Event]) -> list[str]:
    log = await world.log()
    found = []
    if digest_of(given) != digest_of(log):
        found.append(f"{len(given)} events were given that are not the log's {len(log)}")
    steps = [event.payload.step.step for event in log if event.kind == event_pb2.EVENT_KIND_STEP]
    if steps != list(range(1, len(steps) + 1)):
        found.append("the log does not have every step once")
    if len(world.node.started) != 1:
        found.append(f"the job was started {len(world.node.started)} times over links that came back")
    return found


SCENARIO = Scenario(name="bad_links", promises=("R9",), num_trials=2, trial_seconds=150.0, run=run)
