"""Use cases of nodes: list, register, drain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from control_service.app.idempotency import RequestKey
from control_service.app.ports import Clock, NodeDirectory
from control_service.app.store_ports import Store
from control_service.domain.node import NodeView


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """A node with the jobs whose run is there."""

    view: NodeView
    job_ids: tuple[str, ...]


async def list_nodes(*, store: Store, nodes: NodeDirectory) -> Sequence[NodeStatus]:
    """Nodes by name with what they last reported."""
    raise NotImplementedError


async def register_node(
    name: str, address: str, *, store: Store, nodes: NodeDirectory, clock: Clock, request: RequestKey | None = None
) -> NodeStatus:
    """Adds a node or changes its address; dialing starts with the commit."""
    raise NotImplementedError


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
    raise NotImplementedError
