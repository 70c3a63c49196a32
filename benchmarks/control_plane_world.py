"""Control, a node and their callers as processes, for the control plane's benchmark: starts and ends them, and tells
what processor time each took."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.fakes.control import Client

PATIENCE_SECONDS = 300.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Child:
    """A process that talks in lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, *arguments: str, log: Path | None = None) -> Child:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=None if log is None else log.open("ab"),
            limit=2**28,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        return cls(process)

    async def line(self) -> Any:
        """The next thing it says."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            line = await self.process.stdout.readline()
        assert line, "a process of the benchmark ended early"
        return json.loads(line)

    async def tell(self, order: Any = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(order) + "\n").encode())
        await self.process.stdin.drain()

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        return cpu_seconds(self.process.pid)

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process.returncode is None:
            self.process.send_signal(number)
        await self.process.wait()


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_bytes(pid: int) -> int:
    """What a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class World:
    """One control service with one node, and what the rows of the benchmark need of them."""

    def __init__(self, directory: Path, *, module: str, flags: tuple[str, ...]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._module, self._flags = module, flags
        self.node: Child | None = None
        self.address = ""
        self.job_id = ""
        self.dataset_id = self.project_id = 0

    async def start(self, *, with_node: bool) -> None:
        node = ""
        if with_node:
            self.node = await Child.start(
                "benchmarks.control_plane_node", json.dumps({"directory": str(self.directory / "node")})
            )
            node = f"bench={(await self.node.line())['address']}"
        await self.start_control(node)

    async def start_control(self, node: str = "") -> None:
        """Starts it, and waits until it serves."""
        ready = self.directory / "ready.json"
        self.control = await Child.start(
            *(self._module, "--address", "127.0.0.1:0", "--data-directory", str(self.directory / "control")),
            *("--ready-file", str(ready), "--node", node, *self._flags),
            # A line for every call, as it is by itself.
            log=self.directory / "control.log",
        )
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not ready.exists():
                assert self.control.process.returncode is None, "control did not start"
                await asyncio.sleep(0.01)
        self.address = json.loads(ready.read_text())["address"]

    async def fill(self) -> None:
        """A dataset, a project, and with a node a job that trains."""
        client = Client(self.address)
        try:
            dataset = await client.upload("rows")
            self.dataset_id = dataset.dataset_id
            self.project_id = (await client.create_project(dataset_id=self.dataset_id)).project_id
            if self.node is None:
                return
            await client.until_node_reachable("bench")
            self.job_id = (await client.start_training(self.project_id)).job_id
            async with asyncio.timeout(PATIENCE_SECONDS):
                while (await client.job(self.job_id)).phase != 4:  # noqa: ASYNC110 - TRAINING
                    await asyncio.sleep(0.05)
        finally:
            await client.close()

    async def sequence(self) -> int:
        """The newest of the job's log."""
        client = Client(self.address)
        try:
            return int((await client.job(self.job_id)).last_sequence)
        finally:
            await client.close()

    async def until_sequence(self, sequence: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await self.sequence() < sequence:  # noqa: ASYNC110 - looked at now and then
                await asyncio.sleep(0.2)

    def call(self, name: str, seconds: float, **fields: Any) -> dict[str, Any]:
        """An order for the load's process."""
        ids = {"job_id": self.job_id, "project_id": self.project_id, "dataset_id": self.dataset_id}
        return {"address": self.address, "call": name, "seconds": seconds, **ids, **fields}

    async def end(self) -> None:
        await self.control.end(signal.SIGKILL)
        if self.node is not None:
            await self.node.end(signal.SIGKILL)


@asynccontextmanager
async def world(
    directory: Path, *, with_node: bool = True, module: str = "control_service", flags: tuple[str, ...] = ()
) -> AsyncIterator[World]:
    """Started and filled; ends with the context."""
    made = World(directory, module=module, flags=flags)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(made.end)
        await made.start(with_node=with_node)
        await made.fill()
        yield made


@asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[Child]:
    """A process that is killed at the end."""
    started = await Child.start(*arguments)
    try:
        yield started
    finally:
        await started.end(signal.SIGKILL)
