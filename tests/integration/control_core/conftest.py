"""Cores that are closed whatever a test does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.fakes.control_core import Core
from tests.fakes.control_node import FakeNode

OpenCore = Callable[..., Awaitable[Core]]


@pytest.fixture
async def open_core(tmp_path: Path) -> AsyncIterator[OpenCore]:
    opened: list[Core] = []

    async def make(*nodes: FakeNode, **settings: object) -> Core:
        core = Core(tmp_path / "control.db", nodes, **settings)  # type: ignore[arg-type]
        await core.open()
        opened.append(core)
        return core

    yield make
    for core in opened:
        await core.close()
