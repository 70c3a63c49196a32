"""Use cases of nodes: list, register, drain; and taking them over from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import structlog

from control_service.app.idempotency import RequestKey, once
from control_service.app.ports import Clock, NodeDirectory
from control_service.app.store_ports import Store, Transaction
from control_service.domain.errors import NotFound
from control_service.domain.job_state import ON_NODE
from control_service.domain.node import Node, NodeState, NodeView

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """A node with the jobs whose run is there."""

    view: NodeView
    job_ids: tuple[str, ...]


async def list_nodes(*, store: Store, nodes: NodeDirectory) -> Sequence[NodeStatus]:
    """Nodes by name with what they last reported."""
    return await store.read(lambda tx: [_status(tx, node, nodes) for node in tx.nodes.list_all()])


async def register_node(
    name: str, address: str, *, store: Store, nodes: NodeDirectory, clock: Clock, request: RequestKey | None = None
) -> NodeStatus:
    """Adds a node or changes its address; dialing starts with the commit."""
    now = clock.utc_now()

    def work(tx: Transaction) -> NodeStatus:
        def put() -> tuple[str, NodeStatus]:
            earlier = tx.nodes.get(name)
            node = replace(earlier, address=address) if earlier else Node(name=name, address=address, create_time=now)
            tx.nodes.put(node)
            return name, _status(tx, node, nodes)

        return once(tx, request, now, work=put, replay=lambda reference: _status(tx, _node_of(tx, reference), nodes))

    return await store.transact(work)


def configure_nodes(tx: Transaction, pairs: Sequence[tuple[str, str]], now: datetime) -> None:
    """Makes the nodes that came from settings those of these (name, address) pairs; registered ones stay.

    A live job of a node that is dropped is as on a node that was lost: it goes on elsewhere where its checkpoint lets
    it, and is taken up again when the node is named again.
    """
    for name, address in pairs:
        known = tx.nodes.get(name) or Node(name=name, address=address, create_time=now)
        tx.nodes.put(replace(known, address=address, configured=True))
    names = {name for name, _ in pairs}
    for node in tx.nodes.list_all():
        if node.configured and node.name not in names:
            tx.nodes.delete(node.name)
            _log.info("node-dropped", node=node.name)


async def drain_node(
    name: str,
    *,
    undo: bool = False,
    interrupt: bool = False,
    store: Store,
    nodes: NodeDirectory,
    clock: Clock,
    request: RequestKey | None = None,
) -> NodeStatus:
    """Stops (or with `undo` starts) giving jobs to a node; with `interrupt`, its runs checkpoint and go back to the
    queue. NotFound NODE_NOT_FOUND."""
    now = clock.utc_now()

    def work(tx: Transaction) -> NodeStatus:
        def put() -> tuple[str, NodeStatus]:
            node = replace(_node_of(tx, name), draining=not undo, interrupt=interrupt and not undo)
            tx.nodes.put(node)
            return name, _status(tx, node, nodes)

        return once(tx, request, now, work=put, replay=lambda reference: _status(tx, _node_of(tx, reference), nodes))

    return await store.transact(work)


def _node_of(tx: Transaction, name: str) -> Node:
    node = tx.nodes.get(name)
    if node is None:
        raise NotFound("NODE_NOT_FOUND", f"no node {name!r}", details={"node": name})
    return node


def _status(tx: Transaction, node: Node, nodes: NodeDirectory) -> NodeStatus:
    # The record may be newer than what the directory, which follows commits, knows of it.
    view = nodes.view(node.name)
    view = NodeView(node=node, state=NodeState.CONNECTING) if view is None else replace(view, node=node)
    jobs = [job.job_id for job in tx.jobs.in_states(ON_NODE) if job.node == node.name]
    return NodeStatus(view=view, job_ids=tuple(jobs))
