"""Leases by control's own clock: nothing waits here, the clock is moved."""

from __future__ import annotations

import asyncio
from pathlib import Path

from control_service.adapters.sql.store import SqlStore
from control_service.app.node_monitor import NodeMonitor, NodeMonitorConfig
from control_service.app.nodes import register_node
from control_service.domain.node import NodeState
from tests.fakes.control_clock import FakeClock
from tests.fakes.control_core import until
from tests.fakes.control_node import FakeDialer, FakeNode


async def test_a_node_is_lost_when_its_lease_ends_and_not_before(tmp_path: Path) -> None:
    clock, node = FakeClock(), FakeNode("a")
    store = await SqlStore.open(tmp_path / "control.db")
    monitor = NodeMonitor(
        store=store, dialer=FakeDialer(node), clock=clock, config=NodeMonitorConfig(lease_seconds=30.0)
    )
    await register_node("a", "a", store=store, nodes=monitor, clock=clock)
    await monitor.start()
    try:
        await until(lambda: _state(monitor) is NodeState.REACHABLE)
        node.set_up(False)
        await until(lambda: _accepting(monitor) is False)
        clock.advance(29.0)
        await asyncio.sleep(0)
        assert _state(monitor) is NodeState.REACHABLE
        clock.advance(2.0)
        await until(lambda: _state(monitor) is NodeState.UNREACHABLE)
        node.set_up(True)
        clock.advance(10.0)
        await until(lambda: _state(monitor) is NodeState.REACHABLE and _accepting(monitor) is True)
    finally:
        await monitor.stop()
        await store.close()


def _state(monitor: NodeMonitor) -> NodeState | None:
    view = monitor.view("a")
    return None if view is None else view.state


def _accepting(monitor: NodeMonitor) -> bool | None:
    view = monitor.view("a")
    return None if view is None or view.report is None else view.report.accepting
