"""Projects, datasets, nodes and answered requests over SQLAlchemy Core. Each method is one or two statements."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta

import sqlalchemy as sa

from control_service.adapters.sql import schema, statements
from control_service.adapters.sql.records import (
    dataset_from_row,
    dataset_to_row,
    draft_to_json,
    node_from_row,
    project_from_row,
)
from control_service.adapters.sql.touched import Touched
from control_service.app.store_ports import RequestRecord
from control_service.domain.dataset import Dataset, DatasetDraft
from control_service.domain.errors import AlreadyExists
from control_service.domain.node import Node
from control_service.domain.project import Project, ProjectDraft, dataset_ids

_FORGETTING_PAUSE = timedelta(seconds=1)


def contains(column: sa.ColumnElement[str], text: str) -> sa.ColumnElement[bool]:
    """True where the column holds the text, letter case aside; wildcards in the text mean themselves."""
    return sa.func.lower(column).contains(text.lower(), autoescape=True)


class SqlProjects:
    """Implements `ProjectRepository`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, *, draft: ProjectDraft, now: datetime) -> Project:
        """See the port."""
        self._refuse_taken(draft.name, project_id=0)
        values = {"draft": draft_to_json(draft), "create_time": now, "update_time": now, "etag": secrets.token_hex(8)}
        project_id = statements.INSERT_PROJECT.run(self._connection, {"name": draft.name, **values})[0]["project_id"]
        self._link_datasets(project_id, draft)
        return Project(project_id=project_id, draft=draft, create_time=now, update_time=now, etag=str(values["etag"]))

    def get(self, project_id: int) -> Project | None:
        """See the port."""
        row = statements.GET_PROJECT.first(self._connection, {"at_project_id": project_id})
        return None if row is None else project_from_row(row)

    def list_page(self, *, after_id: int, limit: int, name_contains: str) -> Sequence[Project]:
        """See the port."""
        where = {"at_project_id": after_id, "num_projects": limit}
        if not name_contains:
            return [project_from_row(row) for row in statements.PROJECTS_AFTER.run(self._connection, where)]
        statement = statements.PROJECTS_AFTER_STATEMENT.where(contains(schema.projects.c.name, name_contains))
        return [project_from_row({**row}) for row in self._connection.execute(statement, where).mappings()]

    def update(self, project: Project) -> None:
        """See the port."""
        self._refuse_taken(project.draft.name, project_id=project.project_id)
        table, links = schema.projects, schema.project_datasets
        self._connection.execute(
            sa.update(table)
            .where(table.c.project_id == project.project_id)
            .values(
                name=project.draft.name,
                draft=draft_to_json(project.draft),
                update_time=project.update_time,
                etag=project.etag,
            )
        )
        self._connection.execute(sa.delete(links).where(links.c.project_id == project.project_id))
        self._link_datasets(project.project_id, project.draft)

    def delete(self, project_id: int) -> None:
        """See the port."""
        self._connection.execute(sa.delete(schema.projects).where(schema.projects.c.project_id == project_id))

    def names_of_users_of_dataset(self, dataset_id: int) -> Sequence[str]:
        """See the port."""
        table, links = schema.projects, schema.project_datasets
        statement = (
            sa.select(table.c.name)
            .join(links, links.c.project_id == table.c.project_id)
            .where(links.c.dataset_id == dataset_id)
            .order_by(table.c.project_id)
        )
        return list(self._connection.execute(statement).scalars())

    def _refuse_taken(self, name: str, *, project_id: int) -> None:
        other = statements.PROJECT_NAMED.first(self._connection, {"at_name": name})
        if other is not None and (other_id := other["project_id"]) != project_id:
            raise AlreadyExists(
                "PROJECT_NAME_TAKEN",
                f"project {other_id} has the name {name!r}",
                details={"project_id": str(other_id)},
            )

    def _link_datasets(self, project_id: int, draft: ProjectDraft) -> None:
        rows = [{"project_id": project_id, "dataset_id": dataset_id} for dataset_id in dataset_ids(draft.traits)]
        for row in rows:
            statements.INSERT_PROJECT_DATASETS.run(self._connection, row)


class SqlDatasets:
    """Implements `DatasetRepository`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, *, name: str, draft: DatasetDraft, now: datetime) -> Dataset:
        """See the port."""
        other = self.get_by_name(name)
        if other is not None:
            raise AlreadyExists(
                "DATASET_NAME_TAKEN",
                f"dataset {other.dataset_id} has the name {name!r} and other content",
                details={"dataset_id": str(other.dataset_id)},
            )
        row = {**dataset_to_row(draft), "name": name, "create_time": now}
        statement = sa.insert(schema.datasets).values(row).returning(schema.datasets.c.dataset_id)
        return dataset_from_row({**row, "dataset_id": self._connection.execute(statement).scalar_one()})

    def get(self, dataset_id: int) -> Dataset | None:
        """See the port."""
        row = statements.GET_DATASET.first(self._connection, {"at_dataset_id": dataset_id})
        return None if row is None else dataset_from_row(row)

    def list_missing(self, dataset_ids: Collection[int]) -> Sequence[int]:
        """See the port."""
        return [
            dataset_id
            for dataset_id in dataset_ids
            if not statements.HAS_DATASET.run(self._connection, {"at_dataset_id": dataset_id})
        ]

    def get_by_name(self, name: str) -> Dataset | None:
        """See the port."""
        statement = sa.select(schema.datasets).where(schema.datasets.c.name == name)
        row = self._connection.execute(statement).mappings().first()
        return None if row is None else dataset_from_row({**row})

    def get_many(self, dataset_ids: Collection[int]) -> Mapping[int, Dataset]:
        """See the port."""
        found = [self.get(dataset_id) for dataset_id in dataset_ids]
        return {dataset.dataset_id: dataset for dataset in found if dataset is not None}

    def list_page(self, *, after_id: int, limit: int, name_contains: str) -> Sequence[Dataset]:
        """See the port."""
        table = schema.datasets
        statement = sa.select(table).where(table.c.dataset_id > after_id).order_by(table.c.dataset_id).limit(limit)
        if name_contains:
            statement = statement.where(contains(table.c.name, name_contains))
        return [dataset_from_row({**row}) for row in self._connection.execute(statement).mappings()]

    def delete(self, dataset_id: int) -> None:
        """See the port."""
        self._connection.execute(sa.delete(schema.datasets).where(schema.datasets.c.dataset_id == dataset_id))

    def content_is_used(self, sha256: str) -> bool:
        """See the port."""
        statement = sa.select(
            sa.or_(
                sa.exists().where(schema.datasets.c.sha256 == sha256),
                sa.exists().where(schema.blob_references.c.sha256 == sha256),
            )
        )
        return bool(self._connection.execute(statement).scalar_one())


class SqlNodes:
    """Implements `NodeRepository`."""

    def __init__(self, connection: sa.Connection, touched: Touched) -> None:
        self._connection = connection
        self._touched = touched

    def put(self, node: Node) -> None:
        """See the port."""
        self._connection.execute(sa.delete(schema.nodes).where(schema.nodes.c.name == node.name))
        self._connection.execute(sa.insert(schema.nodes).values(asdict(node)))
        self._touched.nodes = True

    def get(self, name: str) -> Node | None:
        """See the port."""
        row = self._connection.execute(sa.select(schema.nodes).where(schema.nodes.c.name == name)).mappings().first()
        return None if row is None else node_from_row({**row})

    def list_all(self) -> Sequence[Node]:
        """See the port."""
        statement = sa.select(schema.nodes).order_by(schema.nodes.c.name)
        return [node_from_row({**row}) for row in self._connection.execute(statement).mappings()]

    def delete(self, name: str) -> None:
        """See the port."""
        self._connection.execute(sa.delete(schema.nodes).where(schema.nodes.c.name == name))
        self._touched.nodes = True


class SqlRequests:
    """Implements `RequestRepository`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._forgotten: datetime | None = None

    def get(self, method: str, request_id: str) -> RequestRecord | None:
        """See the port."""
        where = {"at_method": method, "at_request_id": request_id}
        row = statements.GET_REQUEST.first(self._connection, where)
        return None if row is None else RequestRecord(**row)

    def put(self, record: RequestRecord) -> None:
        """See the port."""
        row = {name: getattr(record, name) for name in RequestRecord.__dataclass_fields__}
        statements.INSERT_REQUEST.run(self._connection, row)

    def delete_older_than(self, time: datetime) -> int:
        """See the port. Of the writes that are committed together, which are of one time, one does it for all."""
        if self._forgotten is not None and time - self._forgotten < _FORGETTING_PAUSE:
            return 0
        self._forgotten = time
        return statements.FORGET_REQUESTS.count(self._connection, {"at_time": time})
