"""Everything that a trial left, read once: what the client was told, the database, journals, watches, observations.

Imports nothing of either service: the contract's generated messages and the files' documented forms are all it knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.faults.checker.database import Database, Row, read_database
from tests.faults.checker.journal_file import Journal, read_journal
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import (
    artifact_service_pb2,
    dataset_service_pb2,
    job_service_pb2,
    model_service_pb2,
    node_service_pb2,
    project_service_pb2,
)

_FILES = (
    artifact_service_pb2,
    dataset_service_pb2,
    job_service_pb2,
    model_service_pb2,
    node_service_pb2,
    project_service_pb2,
)
# By the RPC's name: they are unique over control's services.
_METHODS = {
    method.name: method
    for file in _FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
OK = "OK"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One call of a client. `response` is None unless the call ended OK."""

    client: str
    number: int
    method: str
    request_id: str
    # The message, and the JSON that was logged of it.
    request: Any
    started: float
    ended: float
    outcome: str
    reason: str
    response: Any

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.client}#{self.number} {self.method}"


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event of a job's log, decoded; `payload` is empty where the bytes are no payload."""

    sequence: int
    attempt: int
    # 0 for control's own.
    run_sequence: int
    kind: int
    raw: bytes
    payload: event_pb2.EventPayload


@dataclass(frozen=True, kw_only=True)
class Run:
    """One attempt's directory on a node."""

    node: str
    job_id: str
    attempt: int
    directory: Path
    specification: Mapping[str, Any]
    # Empty when the run has no journal yet.
    journal: Journal


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A trial's evidence directory."""

    directory: Path
    scenario: Mapping[str, Any]
    operations: tuple[Operation, ...]
    faults: tuple[Mapping[str, Any], ...]
    # By consumer, lines in the order in which they were given.
    watches: Mapping[str, tuple[Mapping[str, Any], ...]]
    processes: tuple[Mapping[str, Any], ...]
    database: Database
    logs: Mapping[str, tuple[Event, ...]]
    # By (job, attempt); the same attempt on two nodes is a list of two.
    runs: Mapping[tuple[str, int], tuple[Run, ...]]
    # `node.json` by node.
    nodes: Mapping[str, Mapping[str, Any]]

    @property
    def control_directory(self) -> Path:
        """Control's data directory."""
        return Path(self.scenario["control_directory"])

    @property
    def output_root(self) -> Path:
        """Where artifacts are put for people."""
        return Path(self.scenario["output_root"])

    def operations_on(self, job_id: str, *methods: str) -> list[Operation]:
        """Calls about a job, whatever became of them."""
        return [
            operation
            for operation in self.operations
            if operation.method in methods and getattr(operation.request, "job_id", "") == job_id
        ]


def read_evidence(directory: Path) -> Evidence:
    """Reads everything. Raises OSError, ValueError for evidence that is not in the agreed form."""
    scenario = json.loads((directory / "scenario.json").read_text(encoding="utf-8"))
    database = read_database(Path(scenario["control_directory"]))
    nodes = {name: Path(path) for name, path in scenario["node_directories"].items()}
    runs: dict[tuple[str, int], tuple[Run, ...]] = {}
    for name, node_directory in nodes.items():
        for run in _runs(name, node_directory):
            runs[run.job_id, run.attempt] = (*runs.get((run.job_id, run.attempt), ()), run)
    return Evidence(
        directory=directory,
        scenario=scenario,
        operations=tuple(_operation(line) for line in _lines(directory / "operations.jsonl")),
        faults=tuple(_lines(directory / "faults.jsonl")),
        watches={path.stem: tuple(_lines(path)) for path in sorted(directory.glob("watches/*.jsonl"))},
        processes=tuple(_lines(directory / "processes.jsonl")),
        database=database,
        logs={job_id: tuple(_event(row) for row in rows) for job_id, rows in database.events.items()},
        runs=runs,
        nodes={
            name: json.loads((path / "node.json").read_text(encoding="utf-8"))
            for name, path in nodes.items()
            if (path / "node.json").exists()
        },
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; a last line that was cut off by its writer's death tells nothing."""
    if not path.exists():
        return []
    *whole, rest = path.read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in whole if line]
    try:
        return [*found, json.loads(rest)] if rest else found
    except ValueError:
        return found


def _operation(line: dict[str, Any]) -> Operation:
    # A full method name says the service too.
    method = line["method"].rpartition("/")[2]
    descriptor = _METHODS[method]
    response = line.get("response")
    return Operation(
        client=str(line["client"]),
        number=int(line["number"]),
        method=method,
        request_id=line.get("request_id") or "",
        request=_message(descriptor.input_type, line.get("request")),
        started=float(line["started"]),
        ended=float(line["ended"]),
        outcome=line["outcome"],
        reason=line.get("reason") or "",
        response=_message(descriptor.output_type, response) if line["outcome"] == OK else None,
    )


def _message(descriptor: Any, content: Any) -> Message:
    message: Message = GetMessageClass(descriptor)()
    return ParseDict(content or {}, message, ignore_unknown_fields=True)


def _event(row: Row) -> Event:
    raw = bytes(row["payload"])
    return Event(
        sequence=row["sequence"],
        attempt=row["attempt"],
        run_sequence=row["run_sequence"] or 0,
        kind=row["kind"],
        raw=raw,
        payload=event_pb2.EventPayload.FromString(raw),
    )


def _runs(node: str, directory: Path) -> list[Run]:
    found = []
    for path in sorted(directory.glob("runs/*/*/run.json")):
        journal = path.with_name("journal")
        found.append(
            Run(
                node=node,
                job_id=path.parent.parent.name,
                attempt=int(path.parent.name),
                directory=path.parent,
                specification=json.loads(path.read_text(encoding="utf-8")),
                journal=read_journal(journal) if journal.exists() else Journal(events=(), num_torn_bytes=0),
            )
        )
    return found
