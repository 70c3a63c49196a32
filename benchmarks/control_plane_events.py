"""Rows of the control plane's benchmark about events: from a journal over the database to decoding watchers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from benchmarks.control_plane_world import World, child, resident_bytes, world

_LOAD = "benchmarks.control_plane_load"
# Before what is measured: connections, caches, the first windows.
_SETTLE_SECONDS = 1.5
_LONGER_SECONDS = 5.0


def _order(at: World, num_watchers: int, **fields: Any) -> str:
    return json.dumps(
        {"kind": "watch", "address": at.address, "job_id": at.job_id, "num_watchers": num_watchers, **fields}
    )


async def live(directory: Path, *, rate: float, num_watchers: int, seconds: float, **fields: Any) -> dict[str, Any]:
    """Events at a rate, and how old they are when a watcher has them decoded."""
    async with world(directory) as at:
        assert at.node is not None
        async with child(_LOAD, _order(at, num_watchers, **fields)) as load:
            await load.line()
            return await _measure(at, load, rate=rate, num_watchers=num_watchers, seconds=seconds)


async def _measure(at: World, load: Any, *, rate: float, num_watchers: int, seconds: float) -> dict[str, Any]:
    assert at.node is not None
    await at.node.tell({"rate": rate})
    await asyncio.sleep(_SETTLE_SECONDS)
    before = at.control.cpu_seconds(), at.node.cpu_seconds(), await at.sequence()
    await load.tell()
    await asyncio.sleep(seconds)
    await load.tell()
    seen = await load.line()
    after = at.control.cpu_seconds(), at.node.cpu_seconds(), await at.sequence()
    await at.node.tell({"rate": 0})
    ages = sorted(seen["oldest_seconds"]) or [float("nan")]
    deliveries = seen["num_events"]
    return {
        "events_per_second_stored": (after[2] - before[2]) / seen["seconds"],
        "deliveries_per_second": deliveries / seen["seconds"],
        "messages_per_second": seen["num_messages"] / seen["seconds"],
        # Of the oldest event of every message: what a client waits at worst.
        "age_ms": {"p50": ages[len(ages) // 2] * 1e3, "p99": ages[int(len(ages) * 0.99)] * 1e3, "max": ages[-1] * 1e3},
        "cores_used": {
            "control": (after[0] - before[0]) / seen["seconds"],
            "node": (after[1] - before[1]) / seen["seconds"],
            "watchers": seen["cpu_seconds"] / seen["seconds"],
        },
        "control_us_per_message": (after[0] - before[0]) / max(1, seen["num_messages"]) * 1e6,
        "problems": seen["problems"][:3],
    }


async def crowd_and_calls(directory: Path, *, num_watchers: int, seconds: float) -> dict[str, Any]:
    """A crowd watches ten steps a second while others call, 200 times a second, and ask for health."""
    async with world(directory) as at, child(_LOAD, _order(at, num_watchers, num_decoding=20)) as load:
        await load.line()
        calls = [
            at.call("GetJob", seconds, per_second=100),
            at.call("ListProjects", seconds, per_second=100),
            at.call("Health", seconds, per_second=20),
        ]
        # Longer than the calls and their process' start: the crowd's end is another measurement.
        crowd = _measure(at, load, rate=10, num_watchers=num_watchers, seconds=seconds + _LONGER_SECONDS)
        measuring = asyncio.create_task(crowd)
        await asyncio.sleep(_SETTLE_SECONDS)
        async with child(_LOAD, json.dumps({"kind": "calls", "together": True, "calls": calls})) as callers:
            answers = await callers.line()
        found = await measuring
    for call, answer in zip(calls, answers, strict=True):
        found[call["call"]] = {name: answer[name] for name in ("p50_ms", "p99_ms")}
    return found


async def history_cold(directory: Path, *, num_events: int, num_watchers: int) -> dict[str, Any]:
    """Everybody reads the whole log from a service that has read none of it."""
    async with world(directory) as at:
        assert at.node is not None
        before = at.control.cpu_seconds()
        started = asyncio.get_running_loop().time()
        await at.node.tell({"burst": num_events})
        await at.until_sequence(num_events)
        ingest_seconds = asyncio.get_running_loop().time() - started
        ingest_cpu = at.control.cpu_seconds() - before
        await at.control.end()
        await at.node.end()
        (at.directory / "ready.json").unlink(missing_ok=True)
        await at.start_control()
        before = at.control.cpu_seconds()
        async with child(_LOAD, _order(at, num_watchers, until_sequence=num_events)) as load:
            seen = await load.line()
        used = at.control.cpu_seconds() - before
    return {
        "deliveries_per_second": seen["num_events"] / seen["seconds"],
        "control_cpu_us_per_delivery": used / seen["num_events"] * 1e6,
        "client_cpu_us_per_delivery": seen["cpu_seconds"] / seen["num_events"] * 1e6,
        "ingest_events_per_second": num_events / ingest_seconds,
        "ingest_cpu_us_per_event": ingest_cpu / num_events * 1e6,
        "problems": seen["problems"][:3],
    }


async def crowd(directory: Path, *, counts: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Ten steps a second to more and more watchers; memory and time of each."""
    found: dict[str, Any] = {}
    async with world(directory) as at:
        for count in counts:
            idle_bytes = resident_bytes(at.control.process.pid)
            async with child(_LOAD, _order(at, count, num_decoding=32)) as load:
                await load.line()
                result = await _measure(at, load, rate=10, num_watchers=count, seconds=seconds)
                result["resident_bytes"] = resident_bytes(at.control.process.pid)
                result["resident_bytes_before"] = idle_bytes
            found[f"{count}"] = result
            await asyncio.sleep(_SETTLE_SECONDS)
    return found
