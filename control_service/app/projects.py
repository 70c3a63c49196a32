"""Use cases of projects: create, read, list, update, delete."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import replace

from control_service.app.idempotency import RequestKey, once
from control_service.app.lookups import project_of, refuse_missing_datasets
from control_service.app.ports import Clock
from control_service.app.store_ports import Store, Transaction
from control_service.domain.errors import Aborted, FailedPrecondition, invalid_field
from control_service.domain.project import WRITABLE_FIELDS, Project, ProjectDraft, checked, dataset_ids


async def create_project(
    draft: ProjectDraft, *, store: Store, clock: Clock, request: RequestKey | None = None
) -> Project:
    """Stores a project. InvalidArgument with the field's path; NotFound DATASET_NOT_FOUND; AlreadyExists
    PROJECT_NAME_TAKEN."""
    good = checked(draft)
    now = clock.utc_now()

    def work(tx: Transaction) -> Project:
        def create() -> tuple[str, Project]:
            refuse_missing_datasets(tx, dataset_ids(good.traits))
            project = tx.projects.insert(draft=good, now=now)
            return str(project.project_id), project

        return once(tx, request, now, work=create, replay=lambda reference: project_of(tx, int(reference)))

    return await store.transact(work)


async def get_project(project_id: int, *, store: Store) -> Project:
    """Reads one project. NotFound PROJECT_NOT_FOUND."""
    return await store.read(lambda tx: project_of(tx, project_id))


async def list_projects(
    *, store: Store, after_id: int = 0, limit: int = 50, name_contains: str = ""
) -> Sequence[Project]:
    """Projects by id after an id; at most `limit`."""
    return await store.read(
        lambda tx: tx.projects.list_page(after_id=after_id, limit=limit, name_contains=name_contains)
    )


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
    wrong = sorted(set(fields).difference(WRITABLE_FIELDS))
    if wrong:
        raise invalid_field("update_mask", f"cannot write {', '.join(wrong)}")
    now = clock.utc_now()

    def work(tx: Transaction) -> Project:
        def update() -> tuple[str, Project]:
            project = project_of(tx, project_id)
            if etag and etag != project.etag:
                raise Aborted("ETAG_MISMATCH", f"project {project_id} was changed; read it again")
            changes = {name: getattr(draft, name) for name in fields or WRITABLE_FIELDS}
            good = checked(replace(project.draft, **changes))
            refuse_missing_datasets(tx, dataset_ids(good.traits))
            changed = replace(project, draft=good, update_time=now, etag=secrets.token_hex(8))
            tx.projects.update(changed)
            return str(project_id), changed

        return once(tx, request, now, work=update, replay=lambda reference: project_of(tx, int(reference)))

    return await store.transact(work)


async def delete_project(project_id: int, *, store: Store, clock: Clock, request: RequestKey | None = None) -> None:
    """Deletes a project. FailedPrecondition PROJECT_HAS_LIVE_JOBS; NotFound PROJECT_NOT_FOUND."""
    now = clock.utc_now()

    def work(tx: Transaction) -> None:
        def delete() -> tuple[str, None]:
            project_of(tx, project_id)
            num_live = tx.jobs.count_live_of_project(project_id)
            if num_live:
                raise FailedPrecondition(
                    "PROJECT_HAS_LIVE_JOBS",
                    f"project {project_id} has {num_live} jobs that are not over",
                    details={"num_live_jobs": str(num_live)},
                )
            tx.projects.delete(project_id)
            return "", None

        return once(tx, request, now, work=delete, replay=lambda _: None)

    await store.transact(work)
