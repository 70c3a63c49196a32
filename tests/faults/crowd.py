"""A process of many watchers of one job: `python -m tests.faults.crowd '<JSON of CrowdConfig>'`. Prints a JSON line
`{"open": n}` when all are open, and what they saw when its standard input ends. Judges nothing."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc

from tunesmith.control.v1 import job_service_pb2

_METHOD = "/tunesmith.control.v1.JobService/WatchJob"
_WATCHES_A_CHANNEL = 50
# Opened at the same time; everybody at once would be another trial.
_OPENED_TOGETHER = 50
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 16 * 1024 * 1024))
# Of connections whose readers stop: what gRPC takes in by itself stays small, as where many streams share it.
_STALLED_OPTIONS = (*_OPTIONS, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 * 1024))


@dataclass(frozen=True, kw_only=True)
class CrowdConfig:
    """What a crowd does."""

    address: str
    job_id: str
    after_sequence: int = 0
    num_watchers: int = 100
    # Of them, how many read what they are given to the letter, and say how old it was.
    num_sampled: int = 20
    # Take one message, and then nothing any more, until the end.
    is_stalled: bool = False


@dataclass
class Seen:
    """What a crowd saw."""

    num_messages: int = 0
    delivery_seconds: list[float] = field(default_factory=list)
    # By code and reason of those whose watch ended.
    ended: dict[str, int] = field(default_factory=dict)


async def watch(
    config: CrowdConfig,
    channel: Any,
    seen: Seen,
    *,
    sampled: bool,
    opened: asyncio.Semaphore,
    ending: asyncio.Event,
) -> None:
    """One watcher. A stalled one reads on when the crowd ends: how it ended is behind what was on its way."""
    stream = channel.unary_stream(
        _METHOD,
        request_serializer=job_service_pb2.WatchJobRequest.SerializeToString,
        response_deserializer=job_service_pb2.WatchJobResponse.FromString if sampled else None,
    )
    async with opened:
        request = job_service_pb2.WatchJobRequest(job_id=config.job_id, after_sequence=config.after_sequence)
        call = stream(request)
        await call.read()
    seen.num_messages += 1
    try:
        if config.is_stalled:
            await ending.wait()
        while (message := await call.read()) is not grpc.aio.EOF:
            seen.num_messages += 1
            if sampled and message.events:
                now = time.time()
                # The oldest of them waited longest.
                seen.delivery_seconds.append(now - message.events[0].time.ToNanoseconds() / 1e9)
    except grpc.aio.AioRpcError as error:
        key = f"{error.code().name} {error.details()}"
        seen.ended[key] = seen.ended.get(key, 0) + 1


async def run(config: CrowdConfig) -> None:
    """Opens them all, and lets them read until standard input ends."""
    seen = Seen()
    opened, ending = asyncio.Semaphore(_OPENED_TOGETHER), asyncio.Event()
    options = _STALLED_OPTIONS if config.is_stalled else _OPTIONS
    async with AsyncExitStack() as stack:
        tasks = []
        for start in range(0, config.num_watchers, _WATCHES_A_CHANNEL):
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(config.address, options=options))
            for number in range(start, min(start + _WATCHES_A_CHANNEL, config.num_watchers)):
                sampled = number < config.num_sampled
                one = watch(config, channel, seen, sampled=sampled, opened=opened, ending=ending)
                tasks.append(asyncio.create_task(one))
        while seen.num_messages < config.num_watchers:  # noqa: ASYNC110 - counted, not told
            await asyncio.sleep(0.1)
        sys.stdout.write(json.dumps({"open": config.num_watchers}) + "\n")
        sys.stdout.flush()
        # What history there was came late by nature.
        seen.delivery_seconds.clear()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        ending.set()
        if config.is_stalled:
            await asyncio.wait(tasks, timeout=30.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    sys.stdout.write(json.dumps(asdict(seen)) + "\n")


class Crowd:
    """A crowd's process, from the outside."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, config: CrowdConfig, *, environment: dict[str, str]) -> Crowd:
        """Starts it and waits until all of it watches."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.faults.crowd", json.dumps(asdict(config))),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            limit=2**26,
        )
        crowd = cls(process)
        assert (await crowd._line())["open"] == config.num_watchers
        return crowd

    async def end(self) -> Seen:
        """Lets it end; what it saw."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        seen = Seen(**await self._line())
        await self._process.wait()
        return seen

    def kill(self) -> None:
        """Whatever it does."""
        if self._process.returncode is None:
            self._process.kill()

    async def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(300):
            line = await self._process.stdout.readline()
        assert line, "the crowd ended early"
        found: dict[str, Any] = json.loads(line)
        return found


def percentile(values: list[float], part: float) -> float:
    """The value that this part of all of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


if __name__ == "__main__":
    asyncio.run(run(CrowdConfig(**json.loads(sys.argv[1]))))
