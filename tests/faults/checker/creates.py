"""R1 and R2: what a client was told to be there is there, once, as it was told; what it was not told is there at most
once; the same request id is the same answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from tests.faults.checker.database import Row
from tests.faults.checker.evidence import OK, Evidence, Operation
from tests.faults.checker.tally import Tally

# Whether the call had an effect is not known: the connection was lost, or nobody answered in time.
_OPEN_OUTCOMES = frozenset({"UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL"})


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A thing that calls create: how it is named, where it lies, and which of its facts never change."""

    field: str
    key: str
    rows: Callable[[Evidence], Mapping[Any, Row]]
    facts: Callable[[Any], Mapping[str, Any]]
    in_row: Callable[[Row], Mapping[str, Any]]
    # Calls after which one may be gone, and the field of their request that names it.
    deleted_by: str


def _microseconds(time: Timestamp) -> int:
    return time.seconds * 1_000_000 + time.nanos // 1_000


_JOB_FACTS = ("project_id", "project_name", "priority", "spec_digest", "output_path", "retry_of_job_id")
_DATASET_FACTS = ("name", "sha256", "size_bytes", "num_examples", "format")
_PROJECT_FACTS = ("name",)


def _facts(names: tuple[str, ...]) -> Callable[[Any], Mapping[str, Any]]:
    return lambda message: {
        **{name: getattr(message, name) for name in names},
        "create_time": _microseconds(message.create_time),
    }


def _in_row(names: tuple[str, ...]) -> Callable[[Row], Mapping[str, Any]]:
    return lambda row: {name: row[name] for name in (*names, "create_time")}


_JOB = _Kind(
    field="job",
    key="job_id",
    rows=lambda evidence: evidence.database.jobs,
    facts=_facts(_JOB_FACTS),
    in_row=_in_row(_JOB_FACTS),
    deleted_by="DeleteJob",
)
_PROJECT = _Kind(
    field="project",
    key="project_id",
    rows=lambda evidence: evidence.database.projects,
    # A project's name may be changed; its time of creation may not.
    facts=_facts(()),
    in_row=_in_row(()),
    deleted_by="DeleteProject",
)
_DATASET = _Kind(
    field="dataset",
    key="dataset_id",
    rows=lambda evidence: evidence.database.datasets,
    facts=_facts(_DATASET_FACTS),
    in_row=_in_row(_DATASET_FACTS),
    deleted_by="DeleteDataset",
)
_CREATES: Mapping[str, _Kind] = {
    "StartTraining": _JOB,
    "RetryJob": _JOB,
    "ExportArtifact": _JOB,
    "CreateProject": _PROJECT,
    "RegisterDataset": _DATASET,
    "UploadDataset": _DATASET,
}
# Of a project as it was made, when nobody changed it since.
_WRITTEN = ("name", "base_model", "model_type", "training_type", "output_directory")


def check_creates(evidence: Evidence, tally: Tally) -> None:
    """R1."""
    tally.expect(
        "R1", evidence.database.integrity == "ok", f"the database is damaged: {evidence.database.integrity[:200]}"
    )
    explained: dict[str, set[Any]] = defaultdict(set)
    num_open: dict[str, int] = defaultdict(int)
    for operation in evidence.operations:
        kind = _CREATES.get(operation.method)
        if kind is None:
            continue
        record = evidence.database.requests.get((operation.method, operation.request_id))
        if operation.outcome == OK:
            key = _check_acked(operation, kind, evidence, tally)
            explained[kind.field].add(key)
            if operation.request_id:
                tally.expect(
                    "R1",
                    record is not None and record["reference"] == str(key),
                    f"{operation.name}: the store does not know that request {operation.request_id} made {key}",
                )
        elif record is not None:
            explained[kind.field].add(_typed(record["reference"], kind))
        elif operation.outcome in _OPEN_OUTCOMES and not operation.request_id:
            num_open[kind.field] += 1
        if operation.outcome != OK and operation.outcome not in _OPEN_OUTCOMES and operation.reason:
            _check_refused(operation, record, evidence, tally)
    _check_nothing_else(evidence, explained, num_open, tally)


def _typed(reference: str, kind: _Kind) -> Any:
    return reference if kind is _JOB else int(reference)


def _check_acked(operation: Operation, kind: _Kind, evidence: Evidence, tally: Tally) -> Any:
    told = getattr(operation.response, kind.field)
    key = getattr(told, kind.key)
    row = kind.rows(evidence).get(key)
    if _was_deleted(evidence, kind, key):
        return key
    if not tally.expect("R1", row is not None, f"{operation.name}: {kind.field} {key} was acknowledged and is gone"):
        return key
    assert row is not None
    facts, found = dict(kind.facts(told)), dict(kind.in_row(row))
    if kind is _PROJECT and not any(
        changed.request.project.project_id == key
        for changed in evidence.operations
        if changed.method == "UpdateProject" and changed.outcome in {OK, *_OPEN_OUTCOMES}
    ):
        facts |= {name: getattr(told, name) for name in _WRITTEN}
        found |= {name: row["draft"][name] for name in _WRITTEN}
    for name, value in facts.items():
        tally.expect(
            "R1",
            _same(value, found[name]),
            f"{operation.name}: {kind.field} {key} was acknowledged with {name} {value!r} and has {found[name]!r}",
        )
    return key


def _same(told: Any, stored: Any) -> bool:
    # Paths are stored as they are used.
    return told == stored or (isinstance(told, str) and told.removeprefix("./") == str(stored).removeprefix("./"))


def _was_deleted(evidence: Evidence, kind: _Kind, key: Any) -> bool:
    return any(
        operation.method == kind.deleted_by
        and getattr(operation.request, kind.key) == key
        and operation.outcome in {OK, *_OPEN_OUTCOMES}
        for operation in evidence.operations
    )


def _check_refused(operation: Operation, record: Row | None, evidence: Evidence, tally: Tally) -> None:
    """A refusal with a reason is an answer: nothing was made by it, unless by another call of the same id."""
    others = [
        other
        for other in evidence.operations
        if other is not operation
        and (other.method, other.request_id) == (operation.method, operation.request_id)
        and (other.outcome == OK or other.outcome in _OPEN_OUTCOMES)
    ]
    if operation.request_id and not others:
        tally.expect(
            "R1",
            record is None,
            f"{operation.name}: was refused with {operation.reason} and left a record of request"
            f" {operation.request_id} all the same",
        )


def _check_nothing_else(
    evidence: Evidence, explained: Mapping[str, set[Any]], num_open: Mapping[str, int], tally: Tally
) -> None:
    """What lies there and nobody asked for is a duplicate of something."""
    for kind in (_JOB, _PROJECT, _DATASET):
        methods = {method for method, known in _CREATES.items() if known is kind}
        if not any(operation.method in methods for operation in evidence.operations):
            continue
        unexplained = sorted(set(kind.rows(evidence)) - explained[kind.field])
        tally.expect(
            "R1",
            len(unexplained) <= num_open[kind.field],
            f"nobody asked for {kind.field}s {unexplained[:5]} ({len(unexplained)},"
            f" and {num_open[kind.field]} calls without a request id are open)",
        )


def check_request_ids(evidence: Evidence, tally: Tally) -> None:
    """R2."""
    by_request: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for operation in evidence.operations:
        if operation.request_id:
            by_request[operation.method, operation.request_id].append(operation)
    for (method, request_id), operations in by_request.items():
        acked = [operation for operation in operations if operation.outcome == OK]
        bodies = {_body(operation.request) for operation in acked}
        tally.expect("R2", len(bodies) <= 1, f"{method} {request_id}: two bodies were both accepted")
        for operation in operations:
            if acked and _body(operation.request) not in bodies and operation.outcome not in {OK, *_OPEN_OUTCOMES}:
                tally.expect(
                    "R2",
                    operation.outcome == "ALREADY_EXISTS" and operation.reason == "REQUEST_ID_REUSED",
                    f"{operation.name}: another body under {request_id} was answered with"
                    f" {operation.outcome} {operation.reason}",
                )
        kind = _CREATES.get(method)
        if kind is None or not acked:
            continue
        answers = {
            (getattr(told, kind.key), *sorted(kind.facts(told).items()))
            for told in (getattr(operation.response, kind.field) for operation in acked)
        }
        tally.expect("R2", len(answers) == 1, f"{method} {request_id} was answered in {len(answers)} ways: {answers}")


def _body(request: Message) -> bytes:
    body = type(request)()
    body.CopyFrom(request)
    if "request_id" in body.DESCRIPTOR.fields_by_name:
        body.ClearField("request_id")
    return body.SerializeToString(deterministic=True)
