"""Reads one thing by its id inside a transaction, or refuses with the reason for that thing."""

from __future__ import annotations

from collections.abc import Sequence

from control_service.app.store_ports import Store, Transaction
from control_service.domain.dataset import Dataset
from control_service.domain.errors import NotFound
from control_service.domain.job import Job
from control_service.domain.project import Project


def project_of(tx: Transaction, project_id: int) -> Project:
    """NotFound PROJECT_NOT_FOUND."""
    project = tx.projects.get(project_id)
    if project is None:
        raise NotFound("PROJECT_NOT_FOUND", f"no project {project_id}", details={"project_id": str(project_id)})
    return project


def dataset_of(tx: Transaction, dataset_id: int) -> Dataset:
    """NotFound DATASET_NOT_FOUND."""
    return datasets_of(tx, (dataset_id,))[0]


def datasets_of(tx: Transaction, dataset_ids: Sequence[int]) -> list[Dataset]:
    """All of them, in the order given; NotFound DATASET_NOT_FOUND names those that are not there."""
    refuse_missing_datasets(tx, dataset_ids)
    found = tx.datasets.get_many(dataset_ids)
    return [found[dataset_id] for dataset_id in dataset_ids]


def refuse_missing_datasets(tx: Transaction, dataset_ids: Sequence[int]) -> None:
    """NotFound DATASET_NOT_FOUND names those that are not there."""
    missing = tx.datasets.list_missing(dataset_ids)
    if missing:
        names = ", ".join(map(str, missing))
        raise NotFound("DATASET_NOT_FOUND", f"no dataset {names}", details={"dataset_id": names})


async def newest_job_id(store: Store) -> str:
    """Empty when there is no job. First in, first out goes by the ids, so a new process goes on above it."""
    newest = await store.read(lambda tx: tx.jobs.list_page(before_job_id="", limit=1, project_id=0, states=()))
    return newest[0].job_id if newest else ""


def job_of(tx: Transaction, job_id: str) -> Job:
    """NotFound JOB_NOT_FOUND."""
    job = tx.jobs.get(job_id)
    if job is None:
        raise NotFound("JOB_NOT_FOUND", f"no job {job_id}", details={"job_id": job_id})
    return job
