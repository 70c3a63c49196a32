"""Control's store in memory, behind the same ports as the database: numbered logs, revisions, transactions that undo.

Quick, for thousands of schedules; a test holds it to the SQL store, schedule by schedule. Durable across the crashes
of a simulation because the simulation keeps the `Tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeVar

from control_service.app.store_ports import RequestRecord
from control_service.domain.artifact import Artifact, Checkpoint, CheckpointStatus
from control_service.domain.dataset import Dataset
from control_service.domain.errors import Aborted, FailedPrecondition, Internal
from control_service.domain.event import EventKind, StoredEvent
from control_service.domain.job import Job
from control_service.domain.job_state import TERMINAL, JobState
from control_service.domain.node import Node
from control_service.domain.project import Project
from control_service.domain.run import RunState

T = TypeVar("T")
_MOVES_JOB = frozenset({int(EventKind.JOB_STATE), int(EventKind.NODE_REACHABILITY)})


@dataclass
class Tables:
    """What is durable."""

    projects: dict[int, Project] = field(default_factory=dict)
    datasets: dict[int, Dataset] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    events: dict[str, list[StoredEvent]] = field(default_factory=dict)
    checkpoints: dict[tuple[str, str], Checkpoint] = field(default_factory=dict)
    artifacts: dict[tuple[str, str], Artifact] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    requests: dict[tuple[str, str], RequestRecord] = field(default_factory=dict)

    def copy(self) -> Tables:
        """As it is now; values are immutable."""
        kept = {name: dict(getattr(self, name)) for name in self.__dataclass_fields__ if name != "events"}
        return Tables(**kept, events={job_id: list(log) for job_id, log in self.events.items()})


class MemoryTransaction:
    """Implements `Transaction` over tables; every repository is this object, so that one undo log serves all."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.job_sequences: dict[str, int] = {}
        self.jobs_changed = False
        self.moved_jobs: set[str] = set()
        self.nodes_changed = False
        self._undo: list[Callable[[], object]] = []
        self.projects, self.datasets = _Projects(tables), _Datasets(tables)
        self.jobs, self.events = _Jobs(self), _Events(self)
        self.checkpoints, self.artifacts = _Checkpoints(self), _Artifacts(self)
        self.nodes, self.requests = _Nodes(self), _Requests(self)

    def put(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        if key in table:
            old = table[key]
            self._undo.append(lambda: table.__setitem__(key, old))
        else:
            self._undo.append(lambda: table.pop(key))
        table[key] = value

    def delete(self, table: dict[Any, Any], key: Any) -> None:
        if key in table:
            old = table.pop(key)
            self._undo.append(lambda: table.__setitem__(key, old))

    def extend(self, log: list[StoredEvent], events: Sequence[StoredEvent]) -> None:
        length = len(log)
        log.extend(events)
        self._undo.append(lambda: log.__delitem__(slice(length, None)))

    def move(self, job_id: str) -> None:
        self.jobs_changed = True
        self.moved_jobs.add(job_id)

    def roll_back(self) -> None:
        for undo in reversed(self._undo):
            undo()


class _Projects:
    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def get(self, project_id: int) -> Project | None:
        return self._tables.projects.get(project_id)


class _Datasets:
    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def get_many(self, dataset_ids: Collection[int]) -> dict[int, Dataset]:
        return {number: self._tables.datasets[number] for number in dataset_ids if number in self._tables.datasets}

    def list_missing(self, dataset_ids: Collection[int]) -> list[int]:
        return [number for number in dataset_ids if number not in self._tables.datasets]

    def content_is_used(self, sha256: str) -> bool:
        tables = self._tables
        if any(dataset.sha256 == sha256 for dataset in tables.datasets.values()):
            return True
        held = [artifact.files for artifact in tables.artifacts.values()]
        held += [c.files for c in tables.checkpoints.values() if c.status is CheckpointStatus.REPLICATED]
        return any(file.sha256 == sha256 for files in held for file in files)


class _Jobs:
    def __init__(self, tx: MemoryTransaction) -> None:
        self._tx = tx
        self._jobs = tx.tables.jobs

    def insert(self, job: Job) -> None:
        self._tx.put(self._jobs, job.job_id, replace(job, last_sequence=0))
        self._tx.put(self._tx.tables.events, job.job_id, [])
        self._tx.move(job.job_id)

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def update(self, job: Job) -> Job:
        stored = self._jobs.get(job.job_id)
        if stored is None or stored.revision != job.revision:
            raise Aborted("ETAG_MISMATCH", f"job {job.job_id} was changed by someone else")
        following = replace(job, revision=job.revision + 1)
        self._tx.put(self._jobs, job.job_id, replace(following, last_sequence=stored.last_sequence))
        if job.node_unreachable:
            self._tx.moved_jobs.add(job.job_id)
        return following

    def list_page(
        self, *, before_job_id: str, limit: int, project_id: int, states: Collection[JobState]
    ) -> Sequence[Job]:
        found = [
            job
            for job_id, job in sorted(self._jobs.items(), reverse=True)
            if (not before_job_id or job_id < before_job_id)
            and project_id in (0, job.project_id)
            and (not states or job.state in states)
        ]
        return found[:limit]

    def in_states(self, states: Collection[JobState]) -> Sequence[Job]:
        return [job for _, job in sorted(self._jobs.items()) if job.state in states]

    def list_unneeded_starts(self) -> Sequence[str]:
        return []

    def find_compactable(self, *, ended_before: datetime) -> Job | None:
        return None


class _Events:
    def __init__(self, tx: MemoryTransaction) -> None:
        self._tx = tx

    def append(self, job_id: str, *, attempt: int, events: Sequence[StoredEvent]) -> int:
        stored = self._store(job_id, [replace(event, attempt=attempt, run_sequence=0) for event in events])
        return stored[-1].sequence if stored else self.bounds(job_id)[1]

    def append_run_events(self, job_id: str, *, attempt: int, events: Sequence[StoredEvent]) -> Sequence[StoredEvent]:
        job = self._tx.tables.jobs.get(job_id)
        if job is None or job.attempt != attempt:
            raise FailedPrecondition("STALE_EPOCH", f"attempt {attempt} of job {job_id} is over")
        fresh = [replace(event, attempt=attempt) for event in events if event.run_sequence > job.run_cursor]
        expected = range(job.run_cursor + 1, job.run_cursor + 1 + len(fresh))
        if [event.run_sequence for event in fresh] != list(expected):
            raise Internal("INTERNAL", f"events of job {job_id} do not continue at run sequence {job.run_cursor + 1}")
        if not fresh:
            return []
        self._tx.put(self._tx.tables.jobs, job_id, replace(job, run_cursor=fresh[-1].run_sequence))
        return self._store(job_id, fresh)

    def page(self, job_id: str, *, after_sequence: int, limit: int) -> Sequence[StoredEvent]:
        return self._tx.tables.events.get(job_id, [])[after_sequence : after_sequence + limit]

    def of_kind(self, job_id: str, *, attempt: int, kind: EventKind) -> Sequence[StoredEvent]:
        return [e for e in self._tx.tables.events.get(job_id, []) if e.attempt == attempt and e.kind == int(kind)]

    def bounds(self, job_id: str) -> tuple[int, int]:
        newest = len(self._tx.tables.events.get(job_id, []))
        return min(1, newest), newest

    def _store(self, job_id: str, events: Sequence[StoredEvent]) -> list[StoredEvent]:
        if not events:
            return []
        job, log = self._tx.tables.jobs[job_id], self._tx.tables.events[job_id]
        numbered = [replace(event, sequence=len(log) + 1 + index) for index, event in enumerate(events)]
        self._tx.extend(log, numbered)
        self._tx.put(self._tx.tables.jobs, job_id, replace(job, last_sequence=len(log)))
        self._tx.job_sequences[job_id] = len(log)
        if any(event.kind in _MOVES_JOB for event in numbered):
            self._tx.move(job_id)
        return numbered


class _Checkpoints:
    def __init__(self, tx: MemoryTransaction) -> None:
        self._tx = tx
        self._table = tx.tables.checkpoints

    def put(self, checkpoint: Checkpoint) -> None:
        self._tx.put(self._table, (checkpoint.job_id, checkpoint.name), checkpoint)
        self._tx.moved_jobs.add(checkpoint.job_id)

    def list_for_job(self, job_id: str) -> Sequence[Checkpoint]:
        found = [checkpoint for (owner, _), checkpoint in self._table.items() if owner == job_id]
        return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.name))

    def list_unneeded(self) -> Sequence[Checkpoint]:
        return [
            checkpoint
            for checkpoint in self._table.values()
            if checkpoint.status is not CheckpointStatus.DELETED
            and _is_settled(self._tx.tables.jobs[checkpoint.job_id])
        ]

    def set_status(self, job_id: str, name: str, status: CheckpointStatus) -> None:
        if (job_id, name) in self._table:
            self.put(replace(self._table[job_id, name], status=status))


def _is_settled(job: Job) -> bool:
    is_uncollected = job.state is JobState.FAILED and job.run_state is RunState.SUCCEEDED
    return job.state in TERMINAL and not is_uncollected


class _Artifacts:
    def __init__(self, tx: MemoryTransaction) -> None:
        self._tx = tx
        self._table = tx.tables.artifacts

    def put(self, artifact: Artifact) -> None:
        self._tx.put(self._table, (artifact.job_id, artifact.name), artifact)

    def list_for_job(self, job_id: str) -> Sequence[Artifact]:
        return [artifact for (owner, _), artifact in sorted(self._table.items()) if owner == job_id]


class _Nodes:
    def __init__(self, tx: MemoryTransaction) -> None:
        self._tx = tx
        self._table = tx.tables.nodes

    def put(self, node: Node) -> None:
        self._tx.put(self._table, node.name, node)
        self._tx.nodes_changed = True

    def get(self, name: str) -> Node | None:
        return self._table.get(name)

    def list_all(self) -> Sequence[Node]:
        return [node for _, node in sorted(self._table.items())]

    def delete(self, name: str) -> None:
        self._tx.delete(self._table, name)
        self._tx.nodes_changed = True


class _Requests:
    def __init__(self, tx: MemoryTransaction) -> None:
        self._tx = tx
        self._table = tx.tables.requests

    def get(self, method: str, request_id: str) -> RequestRecord | None:
        return self._table.get((method, request_id))

    def put(self, record: RequestRecord) -> None:
        self._tx.put(self._table, (record.method, record.request_id), record)

    def delete_older_than(self, time: datetime) -> int:
        old = [key for key, record in self._table.items() if record.create_time < time]
        for key in old:
            self._tx.delete(self._table, key)
        return len(old)
