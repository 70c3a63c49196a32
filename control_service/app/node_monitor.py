"""Listens to every node and says how it stands. Times each by control's own monotonic clock from the last message of
its standing stream; nodes never time a lease. Decides nothing about jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import structlog

from control_service.app.back_off import BackOff, BackOffConfig
from control_service.app.ports import Clock, NodeClient, NodeDialer
from control_service.app.store_ports import CommitNotice, Store
from control_service.app.tasks import TaskSet
from control_service.domain.errors import TunesmithError, Unavailable
from control_service.domain.node import Node, NodeCapabilities, NodeReport, NodeState, NodeView

_log = structlog.get_logger(__name__)

# Leases are looked at this often, in heartbeats: the most that a stop of this process adds to a silence.
_LEASE_TICK = 0.2
# A node times its heartbeats by its own clock. With one that runs half as fast as time, and control's twice as fast, a
# heartbeat comes after four times what was asked for; that, and the way, must fit into a lease.
_MIN_HEARTBEATS_OF_A_LEASE = 5


@dataclass(frozen=True, kw_only=True)
class NodeMonitorConfig:
    """How nodes are listened to."""

    lease_seconds: float = 30.0
    heartbeat_seconds: float = 5.0
    capabilities_refresh_seconds: float = 15.0
    # A server that was started again must be heard within its node's lease.
    back_off: BackOffConfig = field(default_factory=lambda: BackOffConfig(max_seconds=2.0))


class NodeMonitor:
    """Implements `NodeDirectory`. Views are replaced whole, so any thread may read them."""

    def __init__(self, *, store: Store, dialer: NodeDialer, clock: Clock, config: NodeMonitorConfig) -> None:
        self._store = store
        self._dialer = dialer
        self._clock = clock
        self._config = config
        self._heartbeat_seconds = min(config.heartbeat_seconds, config.lease_seconds / _MIN_HEARTBEATS_OF_A_LEASE)
        self._clients: dict[str, NodeClient] = {}
        self._heard_seconds: dict[str, float] = {}
        self._views: dict[str, NodeView] = {}
        # Job -> the highest attempt that a refusal told of.
        self._noted_attempts: dict[str, int] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._tasks = TaskSet()
        self._records_changed = asyncio.Event()
        store.subscribe(self._on_commit)

    def subscribe(self, listener: Callable[[str], None]) -> None:
        """Has the listener called with a node's name whenever its view changed."""
        self._listeners.append(listener)

    def views(self) -> Sequence[NodeView]:
        """See the port."""
        views = self._views
        return tuple(views[name] for name in sorted(views))

    def view(self, name: str) -> NodeView | None:
        """See the port."""
        return self._views.get(name)

    def client(self, name: str) -> NodeClient | None:
        """See the port."""
        return self._clients.get(name)

    def mark_busy(self, name: str) -> None:
        """The node said that it takes no run; believed until its next report."""
        view = self._views.get(name)
        if view is not None and view.report is not None:
            self._put(replace(view, report=replace(view.report, accepting=False)), tell=False)

    def mark_unfit(self, name: str, job_id: str) -> None:
        """The node has no device with enough memory for the job; believed until control or the node begins anew."""
        view = self._views.get(name)
        if view is not None:
            self._put(replace(view, unfit_jobs=view.unfit_jobs | {job_id}), tell=False)

    def note_attempt(self, job_id: str, attempt: int) -> None:
        """A node refused an attempt because it knows this later one, which its reports need not have any more."""
        self._noted_attempts[job_id] = max(attempt, self._noted_attempts.get(job_id, 0))

    def highest_attempt(self, job_id: str) -> int:
        """The highest attempt at the job that any node told of; 0: none did."""
        told = [self._noted_attempts.get(job_id, 0)]
        for view in self._views.values():
            told += [run.key.attempt for run in (view.report.runs if view.report else ()) if run.key.job_id == job_id]
        return max(told)

    async def start(self) -> None:
        """Dials every recorded node and keeps following the records."""
        await self._follow_records()
        self._tasks.keep(
            "nodes-records", self._keep_following_records, clock=self._clock, back_off=self._config.back_off
        )
        self._tasks.start("nodes-lease", self._watch_leases)
        self._tasks.start("nodes-capabilities", self._keep_refreshing)

    async def stop(self) -> None:
        """Stops listening and closes every client."""
        await self._tasks.stop_all()
        for client in self._clients.values():
            await client.close()
        self._clients = {}

    async def refresh(self) -> None:
        """See the port."""
        await asyncio.gather(*(self._refresh(view.node.name) for view in self.views() if view.is_reachable))

    # Records.

    def _on_commit(self, notice: CommitNotice) -> None:
        if notice.nodes_changed:
            self._records_changed.set()

    async def _keep_following_records(self) -> None:
        # Also when it begins again after an error: what woke it then was not seen to.
        self._records_changed.set()
        while True:
            await self._records_changed.wait()
            self._records_changed.clear()
            await self._follow_records()

    async def _follow_records(self) -> None:
        for node in await self._store.read(lambda tx: tx.nodes.list_all()):
            view = self._views.get(node.name)
            if view is not None and view.node == node:
                continue
            if view is None or view.node.address != node.address:
                await self._dial(node)
            else:
                self._put(replace(view, node=node))

    async def _dial(self, node: Node) -> None:
        await self._tasks.stop(f"node-{node.name}")
        earlier = self._clients.pop(node.name, None)
        if earlier is not None:
            await earlier.close()
        client = self._dialer.dial(name=node.name, address=node.address, installation_id=self._store.installation_id)
        self._clients[node.name] = client
        self._heard_seconds[node.name] = self._clock.monotonic_seconds()
        self._put(NodeView(node=node, state=NodeState.CONNECTING))
        self._tasks.start(f"node-{node.name}", lambda: self._listen(node.name, client))

    # Listening.

    async def _listen(self, name: str, client: NodeClient) -> None:
        back_off = BackOff(self._config.back_off)
        log = _log.bind(node=name)
        while True:
            try:
                # Before the first report, so that a node that counts as reachable is known to have models.
                capabilities = await client.capabilities()
                async for report in client.watch_node(heartbeat_seconds=self._heartbeat_seconds):
                    back_off.reset()
                    self._renew(name)
                    if report.instance_id != capabilities.instance_id:
                        capabilities = await client.capabilities()
                    self._heard(name, report, capabilities)
                    capabilities = self._views[name].capabilities or capabilities
                log.info("node-stream-ended")
            except TunesmithError as error:
                log.info("node-silent", reason=error.reason, message=error.message)
                self._silent(name, "" if isinstance(error, Unavailable) else str(error))
            else:
                self._silent(name, "")
            await self._clock.sleep(back_off.next_seconds())

    def _renew(self, name: str) -> None:
        """Whatever else is to be asked before the node can be used: it is not silent."""
        view = self._views[name]
        self._heard_seconds[name] = self._clock.monotonic_seconds()
        if view.state is NodeState.UNREACHABLE:
            self._put(replace(view, state=NodeState.CONNECTING, last_heard_time=self._clock.utc_now()))

    def _heard(self, name: str, report: NodeReport, capabilities: NodeCapabilities) -> None:
        view = self._views[name]
        if view.capabilities is not None and view.capabilities.instance_id == report.instance_id:
            capabilities = view.capabilities
        problem = "" if capabilities.problem is None else capabilities.problem.message or capabilities.problem.reason
        self._put(
            replace(
                view,
                state=NodeState.REACHABLE,
                report=report,
                capabilities=capabilities,
                problem=problem,
                last_heard_time=self._clock.utc_now(),
            )
        )

    def _silent(self, name: str, problem: str) -> None:
        # Its lease goes on, but nothing new is given to it.
        view = self._views[name]
        report = None if view.report is None else replace(view.report, accepting=False)
        self._put(replace(view, report=report, problem=problem or view.problem), tell=bool(problem))

    async def _watch_leases(self) -> None:
        lease = self._config.lease_seconds
        while True:
            now = self._clock.monotonic_seconds()
            left = [lease]
            for name, heard in list(self._heard_seconds.items()):
                if now - heard < lease:
                    left.append(lease - (now - heard))
                elif self._views[name].state is not NodeState.UNREACHABLE:
                    _log.warning("node-unreachable", node=name, lease_seconds=lease)
                    self._put(replace(self._views[name], state=NodeState.UNREACHABLE))
            pause = min(*left, self._heartbeat_seconds * _LEASE_TICK)
            await self._clock.sleep(pause)
            # Time in which this process was stopped, or its loop blocked, is no silence of a node: what nodes said
            # meanwhile has yet to be read.
            late = self._clock.monotonic_seconds() - now - pause
            if late > 0:
                self._heard_seconds = {name: heard + late for name, heard in self._heard_seconds.items()}

    # Capabilities: models are put on nodes while they run.

    async def _keep_refreshing(self) -> None:
        while True:
            await self._clock.sleep(self._config.capabilities_refresh_seconds)
            await self.refresh()

    async def _refresh(self, name: str) -> None:
        client = self._clients.get(name)
        # None while it is dialed anew.
        if client is None:
            return
        try:
            capabilities = await client.capabilities()
        except TunesmithError as error:
            _log.info("capabilities-not-refreshed", node=name, reason=error.reason)
            return
        view = self._views.get(name)
        # What was asked before the node was dialed anew is another server's answer.
        if view is not None and view.capabilities != capabilities and self._clients.get(name) is client:
            self._put(replace(view, capabilities=capabilities))

    def _put(self, view: NodeView, *, tell: bool = True) -> None:
        self._views = {**self._views, view.node.name: view}
        for listener in self._listeners if tell else ():
            listener(view.node.name)
