"""The stage before training: the node is there with the model, datasets are uploaded, the project is stored."""

import time
from collections.abc import Mapping

from tunesmith.control.v1 import node_service_pb2, project_service_pb2
from tunesmith_cli.demo.examples import Example
from tunesmith_cli.output import Output
from tunesmith_cli.project_file import read_project
from tunesmith_cli.services import ServiceFailed
from tunesmith_client import Client

NODE_SECONDS = 120.0
_POLL_SECONDS = 0.2


def wait_for_node(out: Output, client: Client, base_model: str) -> None:
    """Waits until a reachable node has the base model. Raises ServiceFailed after a while, with what was seen."""
    ends_at = time.monotonic() + NODE_SECONDS
    while True:
        nodes = client.nodes.list()
        reachable = any(node.state == node_service_pb2.NODE_STATE_REACHABLE for node in nodes)
        models = {model.name: model for model in client.models.list()}
        if reachable and base_model in models:
            break
        if time.monotonic() > ends_at:
            seen = ", ".join(models) or "no model"
            raise ServiceFailed(f"no reachable node has {base_model} (seen: {seen})")
        time.sleep(_POLL_SECONDS)
    if models[base_model].problem:
        raise ServiceFailed(f"{base_model} cannot be trained: {models[base_model].problem}")
    for node in nodes:
        devices = ", ".join(device.name for device in node.devices)
        out.remark(f"node {node.name}: {devices}")


def upload_datasets(out: Output, client: Client, example: Example) -> dict[str, int]:
    """Uploads every file and gives dataset ids by name. Files that were uploaded before give the same ids again."""
    ids: dict[str, int] = {}
    for name, path in example.files.items():
        dataset = client.datasets.upload(path, name=name)
        ids[name] = dataset.dataset_id
        out.remark(f"dataset {dataset.dataset_id} ({name}): {dataset.num_examples} examples, {dataset.format}")
    return ids


def store_project(
    client: Client, example: Example, dataset_ids: Mapping[str, int], steps: int | None
) -> project_service_pb2.Project:
    """Creates the project, or replaces the one of this name that an earlier demo left."""
    project = read_project(example.project_text, source=example.source, dataset_id_of=lambda name: dataset_ids[name])
    if steps is not None:
        project.hyperparameters.num_steps = steps
    for existing in client.projects.list(name_contains=project.name):
        if existing.name == project.name:
            project.project_id = existing.project_id
            return client.projects.update(project)
    return client.projects.create(project)
