"""Names and numbers on the command line, resolved to ids. A name that is not there is the service's NotFound."""

from collections.abc import Iterable
from itertools import islice

import grpc

from tunesmith.control.v1 import dataset_service_pb2, project_service_pb2
from tunesmith_client import Client, NotFound

# An answer to a wrong name lists so many of those that are there.
_MOST_NAMES = 20


def find_project(client: Client, name_or_id: str) -> project_service_pb2.Project:
    """The project with this id, or with exactly this name."""
    if name_or_id.isdecimal():
        return client.projects.get(int(name_or_id))
    for project in client.projects.list(name_contains=name_or_id):
        if project.name == name_or_id:
            return project
    there = _some(project.name for project in client.projects.list())
    raise NotFound(
        f"no project is named {name_or_id!r}; there {there}",
        reason="PROJECT_NOT_FOUND",
        code=grpc.StatusCode.NOT_FOUND,
    )


def find_dataset(client: Client, name_or_id: str) -> dataset_service_pb2.Dataset:
    """The dataset with this id, or with exactly this name."""
    if name_or_id.isdecimal():
        return client.datasets.get(int(name_or_id))
    try:
        return client.datasets.find(name_or_id)
    except NotFound as error:
        error.message += f"; there {_some(dataset.name for dataset in client.datasets.list())}"
        raise


def dataset_names(client: Client, project: project_service_pb2.Project) -> dict[int, str]:
    """Names by id of the datasets that a project's traits name, one call each."""
    ids = {source.dataset_id for trait in project.traits for source in trait.datasets}
    ids |= {number for trait in project.traits for number in trait.held_out_dataset_ids}
    return {number: client.datasets.get(number).name for number in sorted(ids)}


def _some(names: Iterable[str]) -> str:
    first = list(islice(names, _MOST_NAMES + 1))
    if not first:
        return "are none"
    more = ", ..." if len(first) > _MOST_NAMES else ""
    return f"are {', '.join(first[:_MOST_NAMES])}{more}"
