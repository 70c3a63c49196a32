"""The store as the application sees it: functions over a transaction's repositories. Plain values in and out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeVar

from control_service.domain.artifact import Artifact, Checkpoint, CheckpointStatus
from control_service.domain.dataset import Dataset, DatasetDraft
from control_service.domain.event import EventKind, StoredEvent
from control_service.domain.job import Job
from control_service.domain.job_state import JobState
from control_service.domain.node import Node
from control_service.domain.project import Project, ProjectDraft

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CommitNotice:
    """What a group of committed transactions touched."""

    # Jobs whose log grew, with their newest sequence.
    job_sequences: Mapping[str, int]
    # True when a job was made or deleted, or a JOB_STATE or NODE_REACHABILITY event was stored.
    jobs_changed: bool
    # True when a node's record was stored.
    nodes_changed: bool
    # Those jobs, jobs whose checkpoints changed, and jobs that were updated while their node was unreachable: what an
    # index of the queue knows of them is old.
    moved_jobs: frozenset[str] = frozenset()
    # By job, the newest events in sequence and without a gap, up to its `job_sequences`: for whom they would be read
    # again at once. May be missing.
    events: Mapping[str, Sequence[StoredEvent]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """A request_id that was answered: the digest of its body, and what the answer was about."""

    method: str
    request_id: str
    body_digest: str
    reference: str
    create_time: datetime


class ProjectRepository(Protocol):
    """Projects."""

    def insert(self, *, draft: ProjectDraft, now: datetime) -> Project:
        """Stores and numbers a project. AlreadyExists PROJECT_NAME_TAKEN."""

    def get(self, project_id: int) -> Project | None: ...

    def list_page(self, *, after_id: int, limit: int, name_contains: str) -> Sequence[Project]:
        """By id, ascending, after an id."""

    def update(self, project: Project) -> None:
        """Replaces the record of this id. AlreadyExists PROJECT_NAME_TAKEN."""

    def delete(self, project_id: int) -> None: ...

    def names_of_users_of_dataset(self, dataset_id: int) -> Sequence[str]:
        """Names of projects whose traits name the dataset."""


class DatasetRepository(Protocol):
    """Datasets."""

    def insert(self, *, name: str, draft: DatasetDraft, now: datetime) -> Dataset:
        """Stores and numbers a dataset. AlreadyExists DATASET_NAME_TAKEN."""

    def get(self, dataset_id: int) -> Dataset | None: ...

    def get_by_name(self, name: str) -> Dataset | None: ...

    def get_many(self, dataset_ids: Collection[int]) -> Mapping[int, Dataset]:
        """Those of the ids that are there."""

    def list_missing(self, dataset_ids: Collection[int]) -> Sequence[int]:
        """Those of the ids that are not there."""

    def list_page(self, *, after_id: int, limit: int, name_contains: str) -> Sequence[Dataset]: ...

    def delete(self, dataset_id: int) -> None: ...

    def content_is_used(self, sha256: str) -> bool:
        """True when a dataset, a collected artifact, a replicated checkpoint or what a job starts from has this
        content."""


class JobRepository(Protocol):
    """Jobs. `last_sequence` is the event log's to write."""

    def insert(self, job: Job) -> None:
        """Stores a job, which holds the content that it starts from."""

    def list_unneeded_starts(self) -> Sequence[str]:
        """Jobs that SUCCEEDED and hold what they started from: only the others can be tried again."""

    def release_start(self, job_id: str) -> Collection[str]:
        """The job holds what it started from no longer; the contents that lost a holder."""

    def get(self, job_id: str) -> Job | None: ...

    def update(self, job: Job) -> Job:
        """Replaces the record if its revision is the stored one, and gives the job with the new revision. Aborted
        ETAG_MISMATCH when someone else was first."""

    def list_page(
        self, *, before_job_id: str, limit: int, project_id: int, states: Collection[JobState]
    ) -> Sequence[Job]:
        """Newest first, before an id (empty: from the newest); project_id 0 and no states mean all."""

    def in_states(self, states: Collection[JobState]) -> Sequence[Job]:
        """Every job in one of the states, oldest first."""

    def find_compactable(self, *, ended_before: datetime) -> Job | None:
        """A job that was over before a time and whose log still has more than its last event."""

    def count_live_of_project(self, project_id: int) -> int: ...

    def live_job_ids_of_dataset(self, dataset_id: int) -> Sequence[str]: ...

    def delete(self, job_id: str) -> None:
        """Deletes the job with its events, checkpoints and artifacts' records."""


class EventLog(Protocol):
    """Each job's events, 1..n without a gap."""

    def append(self, job_id: str, *, attempt: int, events: Sequence[StoredEvent]) -> int:
        """Appends events that control wrote (run_sequence 0); gives the newest sequence."""

    def append_run_events(self, job_id: str, *, attempt: int, events: Sequence[StoredEvent]) -> Sequence[StoredEvent]:
        """Appends a run's events and moves the job's run_cursor. Those stored before are skipped; gives the new ones
        with their sequences. FailedPrecondition STALE_EPOCH when `attempt` is not the job's; Internal on a gap."""

    def page(self, job_id: str, *, after_sequence: int, limit: int) -> Sequence[StoredEvent]: ...

    def of_kind(self, job_id: str, *, attempt: int, kind: EventKind) -> Sequence[StoredEvent]:
        """Every event of one kind of one attempt, in sequence."""

    def bounds(self, job_id: str) -> tuple[int, int]:
        """(oldest kept sequence or 0, newest sequence)."""

    def compact(self, job_id: str, *, before_sequence: int, limit: int) -> int:
        """Deletes the oldest events before a sequence, at most `limit`; gives how many. The rest has no gap."""


class CheckpointRepository(Protocol):
    """Checkpoints of jobs, unique by (job, name)."""

    def put(self, checkpoint: Checkpoint) -> None:
        """Stores or replaces."""

    def list_for_job(self, job_id: str) -> Sequence[Checkpoint]:
        """By step."""

    def list_unneeded(self) -> Sequence[Checkpoint]:
        """Those of jobs that are over, not DELETED; but for jobs that were trained and could not be collected."""

    def set_status(self, job_id: str, name: str, status: CheckpointStatus) -> None: ...


class ArtifactRepository(Protocol):
    """Collected artifacts, unique by (job, name)."""

    def put(self, artifact: Artifact) -> None: ...

    def get(self, job_id: str, name: str) -> Artifact | None: ...

    def list_for_job(self, job_id: str) -> Sequence[Artifact]: ...

    def delete(self, job_id: str, name: str) -> None: ...


class NodeRepository(Protocol):
    """Records of nodes, unique by name."""

    def put(self, node: Node) -> None: ...

    def get(self, name: str) -> Node | None: ...

    def list_all(self) -> Sequence[Node]:
        """By name."""

    def delete(self, name: str) -> None: ...


class RequestRepository(Protocol):
    """Answered request ids."""

    def get(self, method: str, request_id: str) -> RequestRecord | None: ...

    def put(self, record: RequestRecord) -> None: ...

    def delete_older_than(self, time: datetime) -> int: ...


class Transaction(Protocol):
    """Repositories that see one snapshot and, in `transact`, commit together."""

    @property
    def projects(self) -> ProjectRepository: ...
    @property
    def datasets(self) -> DatasetRepository: ...
    @property
    def jobs(self) -> JobRepository: ...
    @property
    def events(self) -> EventLog: ...
    @property
    def checkpoints(self) -> CheckpointRepository: ...
    @property
    def artifacts(self) -> ArtifactRepository: ...
    @property
    def nodes(self) -> NodeRepository: ...
    @property
    def requests(self) -> RequestRepository: ...


class Store(Protocol):
    """Durable state. Functions run off the event loop and must be quick and free of other effects."""

    @property
    def installation_id(self) -> str:
        """A random id made with the database."""

    async def transact(self, work: Callable[[Transaction], T]) -> T:
        """Runs a function in one write transaction; answers after it is durable. An exception undoes this function's
        writes and is raised here. Unavailable STORE_UNAVAILABLE when the store cannot commit or is closed."""

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Runs a function over one read snapshot of what is committed."""

    def subscribe(self, listener: Callable[[CommitNotice], None]) -> None:
        """Has the listener called on the event loop after each commit, before the writers get their answers."""


class StoreWithRoom(Store, Protocol):
    """A store that can tell whether the next change would be taken."""

    async def check_room(self) -> None:
        """Finds out whether changes have room, where that is in doubt. StoreFull DISK_FULL when they have none."""
