"""Links that break between client, control and GPU service: nobody misses, repeats or reorders an event."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from control_service.config import NodeAddress
from tests.fakes.control import Client, control, is_state, is_step
from tests.fakes.gpu_node import FakeGpuNode
from tests.faults.tcp_proxy import TcpProxy
from tunesmith.common.v1 import event_pb2
from tunesmith_client import AsyncClient, ClientConfig, RetryPolicy

pytestmark = pytest.mark.timeout(120)

SEED = 20261122
NUM_STEPS = 300
NUM_CONSUMERS = 8
NUM_CUTS = 12
# Quick, so that cuts are many and not long.
RETRY = RetryPolicy(initial_backoff_seconds=0.01, max_backoff_seconds=0.05)
SUCCEEDED = is_state(event_pb2.JOB_STATE_SUCCEEDED)


def config(address: str, **fields: Any) -> ClientConfig:
    # As often as the services allow to be pinged; by default it is 30 s and 10 s.
    quick = {"heartbeat_seconds": 1.0, "keepalive_seconds": 10.0, "keepalive_timeout_seconds": 1.0}
    return ClientConfig(address=address, retry=RETRY, **{**quick, **fields})


@asynccontextmanager
async def started(node: FakeGpuNode) -> AsyncIterator[FakeGpuNode]:
    await node.start()
    try:
        yield node
    finally:
        await node.close()


async def start_job(client: Client) -> str:
    await client.until_node_reachable()
    dataset = await client.upload("rows")
    project = await client.create_project(dataset_id=dataset.dataset_id)
    return str((await client.start_training(project.project_id)).job_id)


async def whole_log(client: Client, job_id: str) -> list[Any]:
    return list(await client.until_event(job_id, SUCCEEDED))


async def consume(address: str, job_id: str) -> list[Any]:
    async with AsyncClient(config=config(address)) as consumer:
        return [event async for event in consumer.jobs.watch(job_id)]


async def test_consumers_that_are_cut_again_and_again_see_every_event_once(tmp_path: Path) -> None:
    seeded = random.Random(SEED)
    async with (
        started(FakeGpuNode(num_steps=NUM_STEPS)) as node,
        control(tmp_path / "control", node, heartbeat_seconds=0.5) as client,
        TcpProxy.to(client.address) as proxy,
    ):
        node.hold_at_step = NUM_STEPS // 2
        job_id = await start_job(client)
        consumers = [asyncio.create_task(consume(proxy.address, job_id)) for _ in range(NUM_CONSUMERS)]
        await client.until_event(job_id, is_step(NUM_STEPS // 2))
        await proxy.cut_at_random(seeded, times=NUM_CUTS // 2, pause_seconds=0.05)
        await node.release()
        await proxy.cut_at_random(seeded, times=NUM_CUTS // 2, pause_seconds=0.05)
        log = await whole_log(client, job_id)
        assert [event.sequence for event in log] == list(range(1, len(log) + 1))
        for seen in await asyncio.gather(*consumers):
            assert seen == log
        assert proxy.num_accepted > NUM_CONSUMERS


async def test_a_cable_that_is_pulled_is_noticed_by_the_consumer(tmp_path: Path) -> None:
    async with (
        started(FakeGpuNode(num_steps=NUM_STEPS)) as node,
        control(tmp_path / "control", node, heartbeat_seconds=0.5) as client,
        TcpProxy.to(client.address) as proxy,
    ):
        node.hold_at_step = 5
        job_id = await start_job(client)
        consumer = asyncio.create_task(consume(proxy.address, job_id))
        await client.until_event(job_id, is_step(5))
        while not proxy.num_open:  # noqa: ASYNC110 - nothing tells a test of it
            await asyncio.sleep(0.01)
        # Open connections, and nothing passes: no end, no reset, no word.
        proxy.link.black_hole = True
        await node.release()
        log = await whole_log(client, job_id)
        assert not consumer.done()
        before = proxy.num_accepted
        async with asyncio.timeout(60):
            while proxy.num_accepted == before:  # noqa: ASYNC110 - nothing tells a test of it
                await asyncio.sleep(0.01)
        proxy.link.black_hole = False
        proxy.reset_all()
        assert await consumer == log


@pytest.mark.parametrize("trouble", ["resets", "drips", "half-closes"])
async def test_a_bad_link_to_the_node_leaves_no_gap(tmp_path: Path, trouble: str) -> None:
    seeded = random.Random(SEED)
    async with (
        started(FakeGpuNode(num_steps=NUM_STEPS)) as node,
        TcpProxy.to(node.address) as proxy,
        control(tmp_path / "control", nodes=[NodeAddress(name=node.name, address=proxy.address)]) as client,
    ):
        node.hold_at_step = 5
        job_id = await start_job(client)
        await client.until_event(job_id, is_step(5))
        if trouble == "drips":
            proxy.link.drip_bytes_per_second = 20_000
        await node.release()
        if trouble == "resets":
            await proxy.cut_at_random(seeded, times=6, pause_seconds=0.1)
        if trouble == "half-closes":
            for _ in range(3):
                await asyncio.sleep(0.1)
                proxy.half_close_all()
        if trouble == "drips":
            await asyncio.sleep(0.5)
            proxy.link.drip_bytes_per_second = 0
        log = await whole_log(client, job_id)
        assert [event.sequence for event in log] == list(range(1, len(log) + 1))
        steps = [event.payload.step.step for event in log if event.kind == event_pb2.EVENT_KIND_STEP]
        assert steps == list(range(1, NUM_STEPS + 1))
        # One attempt: a link that comes back within the lease costs nothing.
        assert {event.attempt for event in log} <= {0, 1}
        assert len(node.started) == 1
