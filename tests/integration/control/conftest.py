"""A fake node and a client of a control service that knows it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.control import Client, control
from tests.fakes.gpu_node import FakeGpuNode


@pytest.fixture
async def node() -> AsyncIterator[FakeGpuNode]:
    fake = FakeGpuNode()
    await fake.start()
    try:
        yield fake
    finally:
        await fake.close()


@pytest.fixture
async def client(tmp_path: Path, node: FakeGpuNode) -> AsyncIterator[Client]:
    async with control(tmp_path / "control", node) as client:
        await client.until_node_reachable()
        yield client
