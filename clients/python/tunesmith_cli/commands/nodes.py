"""`tunesmith nodes`: the GPU services that control dials."""

from typing import Annotated

import typer

from tunesmith.control.v1 import node_service_pb2
from tunesmith_cli.session import Session, command
from tunesmith_cli.text import byte_count

app = typer.Typer(help="GPU services that control dials.", no_args_is_help=True)

COLUMNS = ("NAME", "ADDRESS", "STATE", "DEVICES", "RESIDENT", "JOBS", "PROBLEM")


def row(node: node_service_pb2.Node) -> tuple[object, ...]:
    """A node as a row of COLUMNS."""
    state = node_service_pb2.NodeState.Name(node.state).removeprefix("NODE_STATE_")
    devices = ", ".join(f"{device.name} {byte_count(device.total_memory_bytes)}" for device in node.devices)
    state = f"{state} (draining)" if node.draining else state
    problems = [f"device {one.index}: {one.quarantine_reason}" for one in node.devices if one.quarantine_reason]
    problem = "; ".join(filter(None, (node.problem, *problems)))
    return (node.name, node.address, state, devices, node.resident_base_model, " ".join(node.job_ids), problem)


@command(app, "list")
def list_nodes(session: Session) -> None:
    """Lists nodes with what they last reported."""
    nodes = session.client.nodes.list()
    session.out.table(COLUMNS, map(row, nodes), nodes)


@command(app, "register")
def register(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the node.")],
    node_address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where its GPU service listens.")],
) -> None:
    """Adds a node, or changes its address."""
    node = session.client.nodes.register(name, node_address)
    session.out.table(COLUMNS, [row(node)], [node])


@command(app, "drain")
def drain(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the node.")],
    undo: Annotated[bool, typer.Option("--undo", help="Give it jobs again.")] = False,
    interrupt: Annotated[bool, typer.Option("--interrupt", help="Checkpoint its runs and queue them again.")] = False,
) -> None:
    """Gives a node no more jobs."""
    node = session.client.nodes.drain(name, undo=undo, interrupt=interrupt)
    session.out.table(COLUMNS, [row(node)], [node])
