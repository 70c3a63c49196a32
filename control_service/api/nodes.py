"""Serves `NodeService`: wire in, use case, wire out."""

from __future__ import annotations

from typing import Any

from control_service.api.dependencies import Dependencies
from control_service.api.requests import request_key
from control_service.api.wire.nodes import node_message
from control_service.app import nodes
from tunesmith.control.v1 import node_service_pb2 as messages
from tunesmith.control.v1 import node_service_pb2_grpc


class NodeServicer(node_service_pb2_grpc.NodeServiceServicer):
    """Nodes, towards operators."""

    def __init__(self, dependencies: Dependencies) -> None:
        self._on = dependencies

    async def ListNodes(self, request: messages.ListNodesRequest, context: Any) -> Any:
        """Lists nodes by name."""
        found = await nodes.list_nodes(store=self._on.store, nodes=self._on.nodes)
        return messages.ListNodesResponse(nodes=[node_message(status) for status in found])

    async def RegisterNode(self, request: messages.RegisterNodeRequest, context: Any) -> Any:
        """Adds a node or changes its address."""
        status = await nodes.register_node(
            request.name,
            request.address,
            store=self._on.store,
            nodes=self._on.nodes,
            clock=self._on.clock,
            request=request_key(request, method="RegisterNode"),
        )
        return messages.RegisterNodeResponse(node=node_message(status))

    async def DrainNode(self, request: messages.DrainNodeRequest, context: Any) -> Any:
        """Stops, or starts again, giving jobs to a node."""
        status = await nodes.drain_node(
            request.name,
            undo=request.undo,
            interrupt=request.interrupt,
            store=self._on.store,
            nodes=self._on.nodes,
            clock=self._on.clock,
            request=request_key(request, method="DrainNode"),
        )
        return messages.DrainNodeResponse(node=node_message(status))
