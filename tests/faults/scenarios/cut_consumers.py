"""R9: consumers whose links are cut again and again (reset, swallowed, half-closed), while control is drained, stopped
and killed: what each was given, put together, is the log."""

from __future__ import annotations

import asyncio
import hashlib
import random
import signal
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.scenario import Finding, Scenario, Trial
from tests.faults.streaming import Streaming, add_to, client_config, digest_of, streaming
from tests.faults.tcp_proxy import TcpProxy
from tunesmith_client import AsyncClient

_NUM_CONSUMERS = 200
_NUM_CUTS = 50
_RESTARTS = (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM)
# Of a consumer that is on no link any more.
_PATIENCE_SECONDS = 90.0
_STEPS_PER_SECOND = 10.0
_CUTS = ("reset", "reset", "reset", "reset", "half-close", "half-close", "black-hole")


def run(trial: Trial) -> list[Finding]:
    """The full count in one go."""
    return cut_consumers(trial, num_consumers=_NUM_CONSUMERS, num_cuts=_NUM_CUTS, restarts=_RESTARTS)


def cut_consumers(
    trial: Trial, *, num_consumers: int, num_cuts: int, restarts: tuple[signal.Signals, ...]
) -> list[Finding]:
    """Cuts each consumer's link `num_cuts` times; `restarts` of control are spread over that time."""
    return asyncio.run(_cut_consumers(trial.directory, trial.seed, num_consumers, num_cuts, restarts))


@dataclass(eq=False)
class _Consumer:
    """One that watches through a link of its own."""

    proxy: TcpProxy
    num_events: int = 0
    num_cuts: int = 0
    # From a cut until the next event that it was given.
    worst_seconds: float = 0.0
    digest: Any = field(default_factory=hashlib.sha256)

    async def watch(self, job_id: str) -> None:
        async with AsyncClient(config=client_config(self.proxy.address)) as client:
            async for event in client.jobs.watch(job_id):
                add_to(self.digest, event)
                self.num_events += 1

    async def be_cut(self, seeded: random.Random, num_cuts: int) -> None:
        for _ in range(num_cuts):
            # Sometimes at once, in the middle of history or of the handshake.
            await asyncio.sleep(seeded.choice((0.0, 0.05, 0.3)))
            before, started = self.num_events, time.monotonic()
            kind = seeded.choice(_CUTS)
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while not self.proxy.num_open:  # noqa: ASYNC110 - nothing tells a trial of it
                    await asyncio.sleep(0.01)
                num_accepted = self.proxy.num_accepted
                if kind == "black-hole":
                    self.proxy.link.black_hole = True
                    while self.proxy.num_accepted == num_accepted:  # noqa: ASYNC110 - as above
                        await asyncio.sleep(0.05)
                    self.proxy.link.black_hole = False
                if kind == "half-close":
                    self.proxy.half_close_all()
                else:
                    self.proxy.reset_all()
                self.num_cuts += 1
                while self.num_events == before:  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.02)
            self.worst_seconds = max(self.worst_seconds, time.monotonic() - started)


async def _cut_consumers(
    directory: Path, seed: int, num_consumers: int, num_cuts: int, restarts: tuple[signal.Signals, ...]
) -> list[Finding]:
    seeded = random.Random(seed)
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(streaming(directory, steps_per_second=_STEPS_PER_SECOND))
        job_id = await world.start_job()
        proxies = [await stack.enter_async_context(TcpProxy.to(world.address)) for _ in range(num_consumers)]
        consumers = [_Consumer(proxy) for proxy in proxies]
        watching = [asyncio.create_task(consumer.watch(job_id)) for consumer in consumers]
        cutting = [
            asyncio.create_task(consumer.be_cut(random.Random(seeded.random()), num_cuts)) for consumer in consumers
        ]
        await _restart(world, consumers, restarts, num_cuts)
        results = await asyncio.gather(*cutting, return_exceptions=True)
        await world.cancel_job()
        async with asyncio.timeout(_PATIENCE_SECONDS):
            ends = await asyncio.gather(*watching, return_exceptions=True)
        log = await world.log()
    right = digest_of(log)
    violations, held = [], 0
    for number, consumer in enumerate(consumers):
        problem = _problem(consumer, results[number], ends[number], right, len(log))
        if problem:
            violations.append(f"consumer {number}: {problem}")
        else:
            held += consumer.num_cuts
    return [
        Finding(
            promise="R9",
            tried=sum(consumer.num_cuts for consumer in consumers) + sum(1 for text in violations),
            held=held,
            violations=tuple(violations),
            worst=max(consumer.worst_seconds for consumer in consumers),
            unit="s",
            what=f"from a cut link to the next event, {num_consumers} consumers, restarts of control included",
        )
    ]


async def _restart(
    world: Streaming, consumers: list[_Consumer], restarts: tuple[signal.Signals, ...], num_cuts: int
) -> None:
    """Restarts control at even distances of cuts."""
    for number, restart in enumerate(restarts, start=1):
        due = len(consumers) * num_cuts * number // (len(restarts) + 1)
        async with asyncio.timeout(_PATIENCE_SECONDS * 10):
            while sum(consumer.num_cuts for consumer in consumers) < due:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.1)
        status = await world.restart_control(restart)
        assert status == (0 if restart == signal.SIGTERM else -restart), f"control ended with status {status}"


def _problem(consumer: _Consumer, cut: Any, end: Any, right: str, num_events: int) -> str:
    if isinstance(end, BaseException):
        return f"its watch broke: {end!r}"
    if isinstance(cut, TimeoutError):
        return f"nothing came for {_PATIENCE_SECONDS:.0f} s after cut {consumer.num_cuts}"
    if isinstance(cut, BaseException):
        raise cut
    if consumer.digest.hexdigest() != right:
        return f"it was given {consumer.num_events} events that are not the log's {num_events}"
    return ""


SCENARIO = Scenario(name="cut_consumers", promises=("R9",), num_trials=1, trial_seconds=240.0, run=run)
