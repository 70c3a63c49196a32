"""Statements of the paths that every call or every batch of events takes, built once. To build one takes longer than to
run it. Names of parameters are those of the columns, with `at_` before those that say which row."""

from __future__ import annotations

from functools import cache
from typing import Final

import sqlalchemy as sa

from control_service.adapters.sql import schema
from control_service.adapters.sql.prepared import Prepared

_jobs, _events, _projects = schema.jobs.c, schema.events.c, schema.projects.c
_datasets, _requests = schema.datasets.c, schema.requests.c


def _most(name: str) -> sa.ColumnElement[int]:
    """A parameter that is a LIMIT. For one that stands alone SQLite prepares the statement anew each time, which takes
    longer than a small statement does."""
    return sa.bindparam(name, type_=sa.Integer()) + 0


# Written once; a job's spec may be large and is not written again with every batch of events.
_WRITTEN_ONCE: Final = frozenset(
    {"job_id", "project_id", "project_name", "spec", "spec_digest", "output_path", "create_time", "retry_of_job_id"}
)
# What an update of a job's record writes; `last_sequence` is the event log's.
JOB_COLUMNS: Final = tuple(c.name for c in schema.jobs.c if c.name not in _WRITTEN_ONCE | {"last_sequence"})

GET_JOB: Final = Prepared(sa.select(schema.jobs).where(_jobs.job_id == sa.bindparam("at_job_id")))
UPDATE_JOB: Final = Prepared(
    sa.update(schema.jobs)
    .where(_jobs.job_id == sa.bindparam("at_job_id"), _jobs.revision == sa.bindparam("at_revision"))
    .values({name: sa.bindparam(name) for name in JOB_COLUMNS})
)

GET_CURSOR: Final = Prepared(
    sa.select(_jobs.attempt, _jobs.run_cursor).where(_jobs.job_id == sa.bindparam("at_job_id"))
)
# Raising the counter locks the job's row, so sequence order is commit order.
_NUMBER_EVENTS: Final = (
    sa.update(schema.jobs)
    .where(_jobs.job_id == sa.bindparam("at_job_id"))
    .values(last_sequence=_jobs.last_sequence + sa.bindparam("num_events"))
    .returning(_jobs.last_sequence)
)
NUMBER_EVENTS: Final = Prepared(_NUMBER_EVENTS)
NUMBER_RUN_EVENTS: Final = Prepared(_NUMBER_EVENTS.values(run_cursor=sa.bindparam("run_cursor")))
# Rows of one INSERT, so that any number needs few statements and few texts.
INSERT_SIZES: Final = (64, 16, 4, 1)
EVENTS_AFTER: Final = Prepared(
    sa.select(_events.sequence, _events.attempt, _events.run_sequence, _events.kind, _events.time, _events.payload)
    .where(_events.job_id == sa.bindparam("at_job_id"), _events.sequence > sa.bindparam("at_sequence"))
    .order_by(_events.sequence)
    .limit(_most("num_events"))
)
NEWEST_SEQUENCE: Final = Prepared(sa.select(_jobs.last_sequence).where(_jobs.job_id == sa.bindparam("at_job_id")))
OLDEST_SEQUENCE: Final = Prepared(
    sa.select(sa.func.min(_events.sequence).label("oldest")).where(_events.job_id == sa.bindparam("at_job_id"))
)

GET_PROJECT: Final = Prepared(sa.select(schema.projects).where(_projects.project_id == sa.bindparam("at_project_id")))
PROJECT_NAMED: Final = Prepared(sa.select(_projects.project_id).where(_projects.name == sa.bindparam("at_name")))
PROJECTS_AFTER_STATEMENT: Final = (
    sa.select(schema.projects)
    .where(_projects.project_id > sa.bindparam("at_project_id"))
    .order_by(_projects.project_id)
    .limit(_most("num_projects"))
)
PROJECTS_AFTER: Final = Prepared(PROJECTS_AFTER_STATEMENT)
INSERT_PROJECT: Final = Prepared(
    sa.insert(schema.projects)
    .values({name: sa.bindparam(name) for name in ("name", "draft", "create_time", "update_time", "etag")})
    .returning(_projects.project_id)
)
INSERT_PROJECT_DATASETS: Final = Prepared(sa.insert(schema.project_datasets))
HAS_DATASET: Final = Prepared(
    sa.select(_datasets.dataset_id).where(_datasets.dataset_id == sa.bindparam("at_dataset_id"))
)
GET_DATASET: Final = Prepared(sa.select(schema.datasets).where(_datasets.dataset_id == sa.bindparam("at_dataset_id")))

GET_REQUEST: Final = Prepared(
    sa.select(schema.requests).where(
        _requests.method == sa.bindparam("at_method"), _requests.request_id == sa.bindparam("at_request_id")
    )
)
INSERT_REQUEST: Final = Prepared(sa.insert(schema.requests))
FORGET_REQUESTS: Final = Prepared(sa.delete(schema.requests).where(_requests.create_time < sa.bindparam("at_time")))


@cache
def insert_events(num_rows: int, dialect: sa.Dialect) -> str:
    """The text of an INSERT of so many events. Parameters by position: each row's values in the table's order of
    columns, as the driver takes them. SQLAlchemy would compile it anew each time."""
    names = [column.name for column in schema.events.c]
    rows: list[dict[str, sa.BindParameter[object]]] = [
        {name: sa.bindparam(f"{name}_{row}") for name in names} for row in range(num_rows)
    ]
    return str(sa.insert(schema.events).values(rows).compile(dialect=dialect))
