"""Rows of the control plane's benchmark about unary calls, beside an empty grpc.aio service; and MLflow's REST."""

from __future__ import annotations

import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.control_plane_world import Child, World, child, world

_LOAD = "benchmarks.control_plane_load"
_ROUNDS = 3
_WRITERS = 128


async def reads(directory: Path, *, seconds: float) -> dict[str, Any]:
    """Reads of ours and of the empty service in turns; then each at half of its own rate."""
    async with world(directory) as at, child("benchmarks.control_plane_echo") as echo:
        # A job that trains, as somebody would look at; nothing is written meanwhile.
        return await _beside_echo(at, echo, ("GetJob", "GetProject", "ListProjects"), seconds=seconds)


async def writes(directory: Path, *, seconds: float) -> dict[str, Any]:
    """Durable writes of ours and of the empty service in turns; then with 5 ms added to every commit."""
    slow = "benchmarks.control_plane_slow_commit"
    async with (
        world(directory / "plain", with_node=False) as at,
        world(directory / "slow", with_node=False, module=slow) as delayed,
        child("benchmarks.control_plane_echo") as echo,
    ):
        # So many in flight that one group of writes is being made while another is being committed.
        found = await _beside_echo(at, echo, ("CreateProject",), seconds=seconds, in_flight=_WRITERS)
        pairs = []
        for _ in range(_ROUNDS):
            calls = [one.call("CreateProject", seconds, in_flight=_WRITERS) for one in (at, delayed)]
            result = await _load(calls)
            pairs.append((result[0]["per_second"], result[1]["per_second"]))
    found["with_5_ms_added"] = {
        "plain_per_second": statistics.median(pair[0] for pair in pairs),
        "slow_per_second": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[1] / pair[0] for pair in pairs),
    }
    return found


async def _beside_echo(
    at: World, echo: Child, names: tuple[str, ...], *, seconds: float, **load: Any
) -> dict[str, Any]:
    address = (await echo.line())["address"]
    empty = {"address": address, "call": "echo", "seconds": seconds, **load}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ("echo", *names)}
    for number in range(_ROUNDS):
        order = [(name, at.call(name, seconds, **load)) for name in names]
        order.insert(0 if number % 2 else len(order), ("echo", empty))
        for name, call in order:
            server = echo if name == "echo" else at.control
            before = server.cpu_seconds()
            result = (await _load([call]))[0]
            result["server_cpu_us"] = (server.cpu_seconds() - before) / result["calls"] * 1e6
            rounds[name].append(result)
    found: dict[str, Any] = {}
    for name, results in rounds.items():
        found[name] = {key: statistics.median(one[key] for one in results) for key in results[0]}
        found[name]["of_echo"] = statistics.median(
            one["per_second"] / empty["per_second"] for one, empty in zip(results, rounds["echo"], strict=True)
        )
        half = found[name]["per_second"] / 2
        call = empty if name == "echo" else at.call(name, seconds, **load)
        result = (await _load([{**call, "per_second": half}]))[0]
        found[name] |= {"half_load_p50_ms": result["p50_ms"], "half_load_p99_ms": result["p99_ms"]}
    return found


async def _load(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async with child(_LOAD, json.dumps({"kind": "calls", "calls": calls})) as load:
        result: list[dict[str, Any]] = await load.line()
    return result


async def mlflow(directory: Path, *, python: str) -> dict[str, Any]:
    """A server of MLflow over SQLite, and one client's metrics: single, and in batches of 1,000."""
    script = Path(__file__).with_name("control_plane_mlflow.py")
    directory.mkdir(parents=True, exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        *(python, str(script), str(directory)), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, "mlflow did not run; give an interpreter that has it with --mlflow"
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result
