"""A control process and a node in this process, with as many links between them and to consumers as a trial wants.

The node's runs go on at a pace. Everything ends with the context. Judges nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from gpu_service.api.server_options import SERVER_OPTIONS
from tests.fakes.control import PATIENCE_SECONDS, Client, ControlProcess
from tests.fakes.gpu_node import FakeGpuNode
from tests.faults.tcp_proxy import TcpProxy
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith_client import AsyncClient, ClientConfig, RetryPolicy

# More steps than any trial waits for.
NUM_STEPS = 10_000_000
# Quick, so that cuts are many and not long.
_RETRY = RetryPolicy(initial_backoff_seconds=0.01, max_backoff_seconds=0.1)
HEARTBEAT_SECONDS = 1.0


class Streaming:
    """Control's process, started again at its address, and one job that goes on until it is cancelled."""

    def __init__(self, directory: Path, node: FakeGpuNode, link: TcpProxy, flags: tuple[str, ...]) -> None:
        self.node = node
        # Between control and the node.
        self.link = link
        self.address = ""
        self.job_id = ""
        self._directory = directory
        self._flags = (
            *("--node-heartbeat-seconds", "0.5", "--heartbeat-seconds", str(HEARTBEAT_SECONDS)),
            *("--log-level", "warning", *flags),
        )
        self.process: ControlProcess | None = None

    @property
    def pid(self) -> int:
        """Control's."""
        assert self.process is not None
        return self.process.process.pid

    async def start_control(self) -> None:
        """Starts control, at the address that it had."""
        address = ("--address", self.address) if self.address else ()
        flags = (*self._flags, "--node", f"{self.node.name}={self.link.address}", *address)
        self.process = await ControlProcess.start(self._directory, *flags)
        self.address = await self.process.until_ready()

    async def restart_control(self, number: signal.Signals) -> int:
        """Ends control by a signal and starts it again; the exit status."""
        assert self.process is not None
        status = await self.process.end(number)
        await self.start_control()
        return status

    async def start_job(self, name: str = "rows") -> str:
        """A job that trains; gives its id."""
        async with self.client() as client:
            await client.until_node_reachable()
            dataset = await client.upload(name)
            project = await client.create_project(dataset_id=dataset.dataset_id, name=name)
            self.job_id = str((await client.start_training(project.project_id)).job_id)
        return self.job_id

    async def cancel_job(self, job_id: str = "") -> None:
        """Ends the job, so that its log ends."""
        async with AsyncClient(config=client_config(self.address)) as client:
            await client.jobs.cancel(job_id or self.job_id)

    async def log(self, job_id: str = "") -> list[event_pb2.Event]:
        """The whole log, checked to be 1..n."""
        found: list[event_pb2.Event] = []
        async with self.client() as client:
            while True:
                after = found[-1].sequence if found else 0
                request = job_service_pb2.ListJobEventsRequest(
                    job_id=job_id or self.job_id, after_sequence=after, page_size=1000
                )
                page = await client.jobs.ListJobEvents(request, timeout=PATIENCE_SECONDS)
                found += page.events
                if not page.events:
                    break
        assert [event.sequence for event in found] == list(range(1, len(found) + 1)), "the log has a gap"
        return found

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """Stubs of control, straight."""
        client = Client(self.address)
        try:
            yield client
        finally:
            await client.close()


@asynccontextmanager
async def streaming(
    directory: Path, *, steps_per_second: float, flags: tuple[str, ...] = ()
) -> AsyncIterator[Streaming]:
    """Control and node, started, with a link between them that can be broken, and nothing on them."""
    node = FakeGpuNode(num_steps=NUM_STEPS)
    node.hold_at_step = 0
    node.server_options = SERVER_OPTIONS
    await node.start()
    pacing = asyncio.create_task(_pace(node, steps_per_second))
    try:
        async with TcpProxy.to(node.address) as link:
            world = Streaming(directory, node, link, flags)
            try:
                await world.start_control()
                yield world
            finally:
                if world.process is not None:
                    await world.process.end(signal.SIGKILL)
    finally:
        pacing.cancel()
        await node.close()
        with suppress(asyncio.CancelledError):
            await pacing


async def _pace(node: FakeGpuNode, steps_per_second: float) -> None:
    """Lets runs do so many steps a second."""
    start = asyncio.get_running_loop().time()
    while True:
        await asyncio.sleep(max(0.02, 1.0 / steps_per_second))
        await node.let_on(int((asyncio.get_running_loop().time() - start) * steps_per_second))


def client_config(address: str, **fields: Any) -> ClientConfig:
    """A client that comes back quickly."""
    quick = {"heartbeat_seconds": HEARTBEAT_SECONDS, "keepalive_seconds": 10.0, "keepalive_timeout_seconds": 2.0}
    return ClientConfig(address=address, retry=_RETRY, **{**quick, **fields})


def add_to(digest: Any, event: event_pb2.Event) -> None:
    """Takes an event into a running digest of what a consumer was given."""
    digest.update(event.SerializeToString(deterministic=True))


def digest_of(events: list[event_pb2.Event]) -> str:
    """The digest of a consumer that was given all these."""
    digest = hashlib.sha256()
    for event in events:
        add_to(digest, event)
    return digest.hexdigest()
