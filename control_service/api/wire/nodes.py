"""Nodes on the wire."""

from __future__ import annotations

from control_service.app.nodes import NodeStatus
from control_service.wire.values import enum_number, timestamp
from tunesmith.control.v1 import node_service_pb2


def node_message(status: NodeStatus) -> node_service_pb2.Node:
    """A node with what it last reported and the jobs whose run is there."""
    view = status.view
    # A report is newer than the capabilities that were asked for once; before it, those are what is known.
    heard = view.report or view.capabilities
    problem = view.problem
    if not problem and view.capabilities is not None and view.capabilities.problem is not None:
        problem = view.capabilities.problem.message
    return node_service_pb2.Node(
        name=view.node.name,
        address=view.node.address,
        state=enum_number(node_service_pb2.NodeState, view.state.value),
        draining=view.is_draining,
        devices=[
            node_service_pb2.NodeDevice(
                index=device.index,
                name=device.name,
                total_memory_bytes=device.total_memory_bytes,
                free_memory_bytes=device.free_memory_bytes,
                quarantine_reason=device.quarantine_reason,
            )
            for device in (heard.devices if heard is not None else ())
        ],
        job_ids=status.job_ids,
        versions=view.capabilities.versions if view.capabilities is not None else {},
        problem=problem,
        last_heard_time=timestamp(view.last_heard_time),
        resident_base_model=view.resident_base_model,
    )
