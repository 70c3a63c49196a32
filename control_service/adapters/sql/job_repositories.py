"""Jobs, their checkpoints and their artifacts over SQLAlchemy Core. Events are in `event_log`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import datetime

import sqlalchemy as sa

from control_service.adapters.sql import schema, statements
from control_service.adapters.sql.records import (
    artifact_from_row,
    artifact_to_row,
    checkpoint_from_row,
    checkpoint_to_row,
    job_from_row,
    job_to_row,
)
from control_service.adapters.sql.touched import Touched
from control_service.domain.artifact import Artifact, Checkpoint, CheckpointStatus, FileReference
from control_service.domain.errors import Aborted
from control_service.domain.job import Job
from control_service.domain.job_state import TERMINAL, JobState
from control_service.domain.run import RunState
from control_service.domain.start_from import start_files

# What a job starts from, as a holder of content.
_START = "start"
_KEPT = tuple(status.value for status in CheckpointStatus if status is not CheckpointStatus.DELETED)
_LIVE = tuple(state.value for state in JobState if state not in TERMINAL)


class SqlJobs:
    """Implements `JobRepository`."""

    def __init__(self, connection: sa.Connection, touched: Touched) -> None:
        self._connection = connection
        self._touched = touched

    def insert(self, job: Job) -> None:
        """See the port."""
        self._connection.execute(sa.insert(schema.jobs).values(**job_to_row(job), last_sequence=0))
        # Its bytes must outlive the job that left them.
        BlobReferences(self._connection).replace(job.job_id, _START, start_files(job.spec))
        self._touched.move(job.job_id)

    def get(self, job_id: str) -> Job | None:
        """See the port."""
        row = statements.GET_JOB.first(self._connection, {"at_job_id": job_id})
        return None if row is None else job_from_row(row)

    def list_unneeded_starts(self) -> Sequence[str]:
        """See the port."""
        table, jobs = schema.blob_references, schema.jobs
        statement = (
            sa.select(table.c.job_id)
            .distinct()
            .join(jobs, jobs.c.job_id == table.c.job_id)
            .where(table.c.holder == _START, jobs.c.state == JobState.SUCCEEDED.value)
        )
        return list(self._connection.execute(statement).scalars())

    def release_start(self, job_id: str) -> Collection[str]:
        """See the port."""
        table = schema.blob_references
        statement = sa.delete(table).where(table.c.job_id == job_id, table.c.holder == _START)
        return set(self._connection.execute(statement.returning(table.c.sha256)).scalars())

    def update(self, job: Job) -> Job:
        """See the port."""
        following = replace(job, revision=job.revision + 1)
        row = job_to_row(following)
        values = {name: row[name] for name in statements.JOB_COLUMNS}
        values |= {"at_job_id": job.job_id, "at_revision": job.revision}
        if statements.UPDATE_JOB.count(self._connection, values) != 1:
            raise Aborted("ETAG_MISMATCH", f"job {job.job_id} was changed by someone else")
        if job.node_unreachable:
            # Whether it may leave its node is told from what its run came to and by which weights, of which no event
            # of control's own tells. Such jobs are few and bring little; the steps of the others move nothing.
            self._touched.moved_jobs.add(job.job_id)
        return following

    def list_page(
        self, *, before_job_id: str, limit: int, project_id: int, states: Collection[JobState]
    ) -> Sequence[Job]:
        """See the port."""
        table = schema.jobs

        def page_of(*conditions: sa.ColumnElement[bool]) -> sa.Select[tuple[object, ...]]:
            statement = sa.select(table).where(*conditions).order_by(table.c.job_id.desc()).limit(limit)
            return statement.where(table.c.job_id < before_job_id) if before_job_id else statement

        names = [state.value for state in states]
        if project_id:
            of_states = [table.c.state.in_(names)] if names else []
            return self._jobs(page_of(table.c.project_id == project_id, *of_states))
        # Each by the index: a page of all of them together would read and sort every job that is in one.
        pages = [self._jobs(page_of(table.c.state == name)) for name in names] if names else [self._jobs(page_of())]
        jobs = sorted((job for page in pages for job in page), key=lambda job: job.job_id, reverse=True)
        return jobs[:limit]

    def in_states(self, states: Collection[JobState]) -> Sequence[Job]:
        """See the port."""
        table = schema.jobs
        names = [state.value for state in states]
        return self._jobs(sa.select(table).where(table.c.state.in_(names)).order_by(table.c.job_id))

    def find_compactable(self, *, ended_before: datetime) -> Job | None:
        """See the port."""
        table, events = schema.jobs, schema.events
        has_more = sa.exists().where(events.c.job_id == table.c.job_id, events.c.sequence < table.c.last_sequence)
        statement = (
            sa.select(table)
            .where(table.c.state.not_in(_LIVE), table.c.end_time < ended_before, has_more)
            .order_by(table.c.job_id)
            .limit(1)
        )
        return next(iter(self._jobs(statement)), None)

    def count_live_of_project(self, project_id: int) -> int:
        """See the port."""
        table = schema.jobs
        statement = (
            sa.select(sa.func.count())
            .select_from(table)
            .where(table.c.project_id == project_id, table.c.state.in_(_LIVE))
        )
        return int(self._connection.execute(statement).scalar_one())

    def live_job_ids_of_dataset(self, dataset_id: int) -> Sequence[str]:
        """See the port."""
        live = self._jobs(sa.select(schema.jobs).where(schema.jobs.c.state.in_(_LIVE)).order_by(schema.jobs.c.job_id))
        return [job.job_id for job in live if any(d.dataset_id == dataset_id for d in job.spec.datasets)]

    def delete(self, job_id: str) -> None:
        """See the port."""
        # Every table of a job refers to it and is deleted with it.
        self._connection.execute(sa.delete(schema.jobs).where(schema.jobs.c.job_id == job_id))
        self._touched.move(job_id)

    def _jobs(self, statement: sa.Select[tuple[object, ...]]) -> list[Job]:
        return [job_from_row({**row}) for row in self._connection.execute(statement).mappings()]


class BlobReferences:
    """Which record of a job holds which content."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def replace(self, job_id: str, holder: str, files: Iterable[FileReference]) -> None:
        """The holder holds exactly these files."""
        table = schema.blob_references
        self._connection.execute(sa.delete(table).where(table.c.job_id == job_id, table.c.holder == holder))
        rows = [{"sha256": sha256, "job_id": job_id, "holder": holder} for sha256 in {file.sha256 for file in files}]
        if rows:
            self._connection.execute(sa.insert(table), rows)


class SqlCheckpoints:
    """Implements `CheckpointRepository`."""

    def __init__(self, connection: sa.Connection, touched: Touched) -> None:
        self._connection = connection
        self._touched = touched
        self._references = BlobReferences(connection)

    def put(self, checkpoint: Checkpoint) -> None:
        """See the port."""
        table = schema.checkpoints
        self._connection.execute(
            sa.delete(table).where(table.c.job_id == checkpoint.job_id, table.c.name == checkpoint.name)
        )
        self._connection.execute(sa.insert(table).values(checkpoint_to_row(checkpoint)))
        self._refer(checkpoint)
        self._touched.moved_jobs.add(checkpoint.job_id)

    def list_for_job(self, job_id: str) -> Sequence[Checkpoint]:
        """See the port."""
        table = schema.checkpoints
        statement = sa.select(table).where(table.c.job_id == job_id).order_by(table.c.step, table.c.name)
        return [checkpoint_from_row({**row}) for row in self._connection.execute(statement).mappings()]

    def list_unneeded(self) -> Sequence[Checkpoint]:
        """See the port."""
        table, jobs = schema.checkpoints, schema.jobs
        is_uncollected = sa.and_(
            jobs.c.state == JobState.FAILED.value,
            sa.func.coalesce(jobs.c.run_state, "") == RunState.SUCCEEDED.value,
        )
        statement = (
            sa.select(table)
            .join(jobs, jobs.c.job_id == table.c.job_id)
            .where(
                # By this they are found: few are there still, of a long history. Nearly all of its jobs are over.
                table.c.status.in_(_KEPT),
                jobs.c.state.not_in(_LIVE),
                sa.not_(is_uncollected),
            )
        )
        return [checkpoint_from_row({**row}) for row in self._connection.execute(statement).mappings()]

    def set_status(self, job_id: str, name: str, status: CheckpointStatus) -> None:
        """See the port."""
        found = [checkpoint for checkpoint in self.list_for_job(job_id) if checkpoint.name == name]
        for checkpoint in found:
            self.put(replace(checkpoint, status=status))

    def _refer(self, checkpoint: Checkpoint) -> None:
        held = checkpoint.files if checkpoint.status is CheckpointStatus.REPLICATED else ()
        self._references.replace(checkpoint.job_id, f"checkpoint:{checkpoint.name}", held)


class SqlArtifacts:
    """Implements `ArtifactRepository`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._references = BlobReferences(connection)

    def put(self, artifact: Artifact) -> None:
        """See the port."""
        self.delete(artifact.job_id, artifact.name)
        self._connection.execute(sa.insert(schema.artifacts).values(artifact_to_row(artifact)))
        self._references.replace(artifact.job_id, f"artifact:{artifact.name}", artifact.files)

    def get(self, job_id: str, name: str) -> Artifact | None:
        """See the port."""
        return next((artifact for artifact in self.list_for_job(job_id) if artifact.name == name), None)

    def list_for_job(self, job_id: str) -> Sequence[Artifact]:
        """See the port."""
        table = schema.artifacts
        statement = sa.select(table).where(table.c.job_id == job_id).order_by(table.c.name)
        return [artifact_from_row({**row}) for row in self._connection.execute(statement).mappings()]

    def delete(self, job_id: str, name: str) -> None:
        """See the port."""
        table = schema.artifacts
        self._connection.execute(sa.delete(table).where(table.c.job_id == job_id, table.c.name == name))
        self._references.replace(job_id, f"artifact:{name}", ())
