"""Chooses the nodes that can be asked about a base model while a caller waits: to plan, to render rows. Dispatches
nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from control_service.app.models import models_by_name
from control_service.app.ports import Clock, NodeClient, NodeDirectory
from control_service.domain.errors import FailedPrecondition, Unavailable
from control_service.domain.node import NodeState, NodeView
from control_service.domain.queue_policy import can_train


def time_left(timeout_seconds: float | None, clock: Clock) -> Callable[[], float | None]:
    """Gives what is left of a time that begins now; None when there is no end to it."""
    start = clock.monotonic_seconds()
    return lambda: None if timeout_seconds is None else max(0.0, timeout_seconds - (clock.monotonic_seconds() - start))


async def nodes_with_model(base_model: str, nodes: NodeDirectory) -> Sequence[tuple[str, NodeClient]]:
    """Reachable nodes with the base, best first; none when no node is reachable, or one that was not heard yet may be
    the one that has it. FailedPrecondition MODEL_NOT_FOUND (`available_models`, `nodes`)."""
    if not any(view.is_reachable for view in nodes.views()):
        return []
    having = _having(base_model, nodes.views())
    if not having:
        # The model may have been put there a moment ago.
        await nodes.refresh()
        having = _having(base_model, nodes.views())
    if not having and is_connecting(nodes.views()):
        return []
    if not having:
        details = {"model": base_model, **_nodes_and_models(nodes.views())}
        available = details["available_models"] or "none"
        raise FailedPrecondition(
            "MODEL_NOT_FOUND", f"no reachable node has {base_model}; there are: {available}", details=details
        )
    return [(name, client) for name in having if (client := nodes.client(name)) is not None]


async def some_nodes_with_model(base_model: str, nodes: NodeDirectory) -> Sequence[tuple[str, NodeClient]]:
    """The same, at least one. FailedPrecondition NO_NODE when there is none, Unavailable NODE_UNREACHABLE when that is
    not known yet."""
    found = await nodes_with_model(base_model, nodes)
    if not found:
        refuse_while_connecting(nodes.views())
        raise FailedPrecondition("NO_NODE", "no node is reachable", details=_nodes_and_models(nodes.views()))
    return found


async def node_with_model(base_model: str, nodes: NodeDirectory) -> tuple[str, NodeClient]:
    """The best of `some_nodes_with_model`."""
    return (await some_nodes_with_model(base_model, nodes))[0]


def is_connecting(views: Sequence[NodeView]) -> bool:
    """Whether a node was not heard yet since control began, for less than its lease: what there is is not known."""
    return any(view.state is NodeState.CONNECTING for view in views)


def refuse_while_connecting(views: Sequence[NodeView]) -> None:
    """Unavailable NODE_UNREACHABLE while what nodes there are is not known."""
    if is_connecting(views):
        raise Unavailable("NODE_UNREACHABLE", "nodes are still being connected to", retry_after_seconds=1.0)


def _having(base_model: str, views: Sequence[NodeView]) -> list[str]:
    # One that cannot train it is asked last: it knows best why it refuses.
    having = [view for view in views if view.is_reachable and view.model(base_model) is not None]
    ranked = sorted(having, key=lambda view: (not can_train(view, base_model, ""), view.is_draining))
    return [view.node.name for view in ranked]


def _nodes_and_models(views: Sequence[NodeView]) -> dict[str, str]:
    return {
        "available_models": ",".join(sorted(models_by_name(views))),
        "nodes": ",".join(view.node.name for view in views if view.is_reachable),
    }
