"""Leases by control's own clock: nothing waits here, the clock is moved."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from control_service.adapters.sql.store import SqlStore
from control_service.app.node_monitor import NodeMonitor, NodeMonitorConfig
from control_service.app.nodes import list_nodes, register_node
from control_service.domain.event import NodeReachabilityFact
from control_service.domain.job_state import JobState
from control_service.domain.node import NodeState
from tests.fakes.control_clock import FakeClock
from tests.fakes.control_core import until
from tests.fakes.control_node import FakeNode
from tests.fakes.control_node_client import FakeDialer, FakeNodeClient
from tests.integration.control_core.conftest import OpenCore


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
        await clock.pass_time(29.0)
        assert _state(monitor) is NodeState.REACHABLE
        await clock.pass_time(2.0)
        await until(lambda: _state(monitor) is NodeState.UNREACHABLE)
        node.set_up(True)
        await clock.pass_time(10.0)
        await until(lambda: _state(monitor) is NodeState.REACHABLE and _accepting(monitor) is True)
    finally:
        await monitor.stop()
        await store.close()


async def test_a_new_server_that_speaks_is_not_silent_while_it_is_asked_what_it_can_do(
    tmp_path: Path,
) -> None:
    clock, node = FakeClock(), FakeNode("a")
    store = await SqlStore.open(tmp_path / "control.db")
    # Asked for what it can do only when its server is another one.
    config = NodeMonitorConfig(lease_seconds=30.0, capabilities_refresh_seconds=10_000.0)
    monitor = NodeMonitor(store=store, dialer=FakeDialer(node), clock=clock, config=config)
    await register_node("a", "a", store=store, nodes=monitor, clock=clock)
    await monitor.start()
    try:
        await until(lambda: _state(monitor) is NodeState.REACHABLE)
        await clock.pass_time(25.0)
        node.instance, node.capabilities_gate = 2, asyncio.Event()
        node.changed()
        await clock.pass_time(25.0)
        assert _state(monitor) is NodeState.REACHABLE
        # Now it has been silent for as long as a lease.
        await clock.pass_time(6.0)
        await until(lambda: _state(monitor) is NodeState.UNREACHABLE)
        node.capabilities_gate.set()
        await until(lambda: _state(monitor) is NodeState.REACHABLE)
    finally:
        await monitor.stop()
        await store.close()


async def test_a_node_that_is_dialed_anew_is_not_asked_by_the_old_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, old, new = FakeClock(), FakeNode("a"), FakeNode("b", models=("org/new",))
    closing, may_close = asyncio.Event(), asyncio.Event()

    async def close(_: FakeNodeClient) -> None:
        closing.set()
        await may_close.wait()

    monkeypatch.setattr(FakeNodeClient, "close", close)
    store = await SqlStore.open(tmp_path / "control.db")
    config = NodeMonitorConfig(lease_seconds=30.0, capabilities_refresh_seconds=10_000.0)
    monitor = NodeMonitor(store=store, dialer=FakeDialer(old, new), clock=clock, config=config)
    await register_node("a", "a", store=store, nodes=monitor, clock=clock)
    await monitor.start()
    try:
        await until(lambda: _state(monitor) is NodeState.REACHABLE)
        old.capabilities_gate = asyncio.Event()
        asked_before = asyncio.create_task(monitor.refresh())
        await register_node("a", "b", store=store, nodes=monitor, clock=clock)
        await closing.wait()
        # While it is dialed there is nobody to ask.
        await monitor.refresh()
        may_close.set()
        await until(lambda: _state(monitor) is NodeState.REACHABLE and _models(monitor) == ["org/new"])
        old.capabilities_gate.set()
        await asked_before
        assert _models(monitor) == ["org/new"]
    finally:
        may_close.set()
        await monitor.stop()
        await store.close()


async def test_a_job_is_not_called_unreachable_once_its_node_was_heard_again(open_core: OpenCore) -> None:
    core = await open_core(FakeNode("a"))
    await core.reachable("a")
    job = await core.start((await core.project()).project_id)
    running = await core.running(job.job_id)
    keeper = core.runtime._supervisor._keepers[job.job_id]
    # What was decided while it was silent, and is carried out when it is not.
    await keeper._mark_unreachable(running, True)
    assert not (await core.view(job.job_id)).job.node_unreachable
    assert not [fact for fact in await core.facts(job.job_id) if isinstance(fact, NodeReachabilityFact)]


async def test_time_in_which_control_itself_was_stopped_is_no_silence_of_a_node(tmp_path: Path) -> None:
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
        for _ in range(3):
            clock.advance(100.0)
            await asyncio.sleep(0.01)
            assert _state(monitor) is NodeState.REACHABLE
        # It counts on from there.
        await clock.pass_time(31.0)
        await until(lambda: _state(monitor) is NodeState.UNREACHABLE)
    finally:
        await monitor.stop()
        await store.close()


async def test_nodes_of_the_settings_go_with_them_and_registered_ones_stay(open_core: OpenCore) -> None:
    nodes = FakeNode("a"), FakeNode("b"), FakeNode("c")
    core = await open_core(*nodes, not_configured={"c"})
    await core.reachable("a", "b")
    job = await core.start((await core.project()).project_id)
    assert (await core.running(job.job_id)).node == "a"
    await register_node("c", "c", store=core.store, nodes=core.runtime.nodes, clock=core.clock)
    await core.reachable()
    core.not_configured = {"a", "c"}
    await core.restart()
    listed = await list_nodes(store=core.store, nodes=core.runtime.nodes)
    assert [status.view.node.name for status in listed] == ["b", "c"]
    # What ran there is as on a node that was lost.
    moved = await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)
    assert moved.node in ("b", "c")
    core.not_configured = {"c"}
    await core.restart()
    await core.reachable()
    await until(lambda: nodes[0].run(job.job_id).is_over)


def _state(monitor: NodeMonitor) -> NodeState | None:
    view = monitor.view("a")
    return None if view is None else view.state


def _accepting(monitor: NodeMonitor) -> bool | None:
    view = monitor.view("a")
    return None if view is None or view.report is None else view.report.accepting


def _models(monitor: NodeMonitor) -> list[str]:
    view = monitor.view("a")
    return [] if view is None or view.capabilities is None else [model.name for model in view.capabilities.models]
