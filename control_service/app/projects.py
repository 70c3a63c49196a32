"""Use cases of projects: create, read, list, update, delete."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from control_service.app.idempotency import RequestKey
from control_service.app.ports import Clock
from control_service.app.store_ports import Store
from control_service.domain.project import Project, ProjectDraft


async def create_project(
    draft: ProjectDraft, *, store: Store, clock: Clock, request: RequestKey | None = None
) -> Project:
    """Stores a project. InvalidArgument with the field's path; NotFound DATASET_NOT_FOUND; AlreadyExists
    PROJECT_NAME_TAKEN."""
    raise NotImplementedError


async def get_project(project_id: int, *, store: Store) -> Project:
    """Reads one project. NotFound PROJECT_NOT_FOUND."""
    raise NotImplementedError


async def list_projects(
    *, store: Store, after_id: int = 0, limit: int = 50, name_contains: str = ""
) -> Sequence[Project]:
    """Projects by id after an id; at most `limit`."""
    raise NotImplementedError


async def update_project(
    project_id: int,
    draft: ProjectDraft,
    *,
    store: Store,
    clock: Clock,
    fields: Collection[str] = (),
    etag: str = "",
    request: RequestKey | None = None,
) -> Project:
    """Replaces the named fields of `WRITABLE_FIELDS` (none named: all). Aborted ETAG_MISMATCH when `etag` is given and
    is not the stored one; InvalidArgument INVALID_FIELD `update_mask` for a field that cannot be written."""
    raise NotImplementedError


async def delete_project(project_id: int, *, store: Store, clock: Clock, request: RequestKey | None = None) -> None:
    """Deletes a project. FailedPrecondition PROJECT_HAS_LIVE_JOBS; NotFound PROJECT_NOT_FOUND."""
    raise NotImplementedError
