"""Names and numbers on the command line, resolved to ids. A name that is not there is the service's NotFound."""

import grpc

from tunesmith.control.v1 import dataset_service_pb2, project_service_pb2
from tunesmith_client import Client, NotFound


def find_project(client: Client, name_or_id: str) -> project_service_pb2.Project:
    """The project with this id, or with exactly this name."""
    if name_or_id.isdecimal():
        return client.projects.get(int(name_or_id))
    for project in client.projects.list(name_contains=name_or_id):
        if project.name == name_or_id:
            return project
    raise NotFound(f"no project is named {name_or_id!r}", reason="PROJECT_NOT_FOUND", code=grpc.StatusCode.NOT_FOUND)


def find_dataset(client: Client, name_or_id: str) -> dataset_service_pb2.Dataset:
    """The dataset with this id, or with exactly this name."""
    if name_or_id.isdecimal():
        return client.datasets.get(int(name_or_id))
    return client.datasets.find(name_or_id)
