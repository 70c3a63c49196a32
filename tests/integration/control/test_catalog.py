"""Projects, datasets, models, nodes, health and reflection over a real server."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.fakes.control import ROWS, Client, control, project, reason_of, until, violated_fields
from tests.fakes.gpu_node import MODEL, FakeGpuNode
from tunesmith.common.v1 import training_spec_pb2
from tunesmith.control.v1 import (
    dataset_service_pb2,
    job_service_pb2,
    model_service_pb2,
    node_service_pb2,
    project_service_pb2,
)


async def test_a_project_comes_back_as_it_was_written(client: Client) -> None:
    dataset = await client.upload("rows")
    created = await client.create_project(
        dataset_id=dataset.dataset_id,
        hyperparameters=training_spec_pb2.Hyperparameters(
            seed=2**53 + 1, lora=training_spec_pb2.Lora(rank=8, dropout=0.0), num_steps=5
        ),
        mix=training_spec_pb2.Mix(total=4),
        sample_prompts=[training_spec_pb2.SamplePrompt(prompt="line\nline", trait_type="reasoning")],
    )
    read = await client.projects.GetProject(
        project_service_pb2.GetProjectRequest(project_id=created.project_id), timeout=60
    )
    assert read.project == created
    assert created.hyperparameters.seed == 2**53 + 1
    assert created.hyperparameters.lora.HasField("dropout")
    assert not created.hyperparameters.HasField("optimizer")

    updated = await client.projects.UpdateProject(
        project_service_pb2.UpdateProjectRequest(
            project=project_service_pb2.Project(project_id=created.project_id, name="renamed", etag=created.etag),
            update_mask=FieldMask(paths=["name"]),
        ),
        timeout=60,
    )
    assert updated.project.name == "renamed"
    assert updated.project.mix == created.mix
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.projects.UpdateProject(
            project_service_pb2.UpdateProjectRequest(
                project=project_service_pb2.Project(project_id=created.project_id, name="again", etag=created.etag),
                update_mask=FieldMask(paths=["name"]),
            ),
            timeout=60,
        )
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    await client.projects.DeleteProject(project_service_pb2.DeleteProjectRequest(project_id=created.project_id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.projects.GetProject(project_service_pb2.GetProjectRequest(project_id=created.project_id))
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.NOT_FOUND, "PROJECT_NOT_FOUND")


NAN = float("nan")
BAD_PROJECTS: dict[str, tuple[dict[str, Any], str]] = {
    "rank of 10^9": (
        {"hyperparameters": training_spec_pb2.Hyperparameters(lora=training_spec_pb2.Lora(rank=10**9))},
        "project.hyperparameters.lora.rank",
    ),
    "NaN learning rate": (
        {
            "hyperparameters": training_spec_pb2.Hyperparameters(
                optimizer=training_spec_pb2.Optimizer(learning_rate=NAN)
            )
        },
        "project.hyperparameters.optimizer.learning_rate",
    ),
    "negative steps": (
        {"hyperparameters": training_spec_pb2.Hyperparameters(num_steps=-1)},
        "project.hyperparameters.num_steps",
    ),
    "parent path": ({"output_directory": "a/../../b"}, "project.output_directory"),
    "absolute path": ({"output_directory": "/etc"}, "project.output_directory"),
    "control character": ({"output_directory": "a\x1b[31m"}, "project.output_directory"),
    "percentages of 99": (
        {
            "traits": [
                training_spec_pb2.Trait(
                    trait_type="reasoning", datasets=[training_spec_pb2.TraitDataset(dataset_id=1, percentage=99)]
                )
            ]
        },
        "project.traits[0].datasets",
    ),
    "all weights zero": (
        {
            "traits": [
                training_spec_pb2.Trait(
                    trait_type="reasoning",
                    weight=0,
                    datasets=[training_spec_pb2.TraitDataset(dataset_id=1, percentage=100)],
                )
            ]
        },
        "project.traits",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_PROJECTS))
async def test_a_bad_project_is_refused_by_field_and_nothing_is_written(client: Client, case: str) -> None:
    fields, place = BAD_PROJECTS[case]
    await client.upload("rows")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.create_project(dataset_id=1, **fields)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert place in violated_fields(caught.value)
    assert (await client.projects.ListProjects(project_service_pb2.ListProjectsRequest())).projects == []


async def test_an_unknown_dataset_is_not_found(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.create_project(dataset_id=77)
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND")


async def test_pages_go_on_where_the_last_one_ended_and_tokens_are_bound(client: Client) -> None:
    await client.upload("rows")
    for number in range(5):
        await client.create_project(dataset_id=1, name=f"p{number}")
    names: list[str] = []
    token = ""
    sizes = []
    while True:
        page = await client.projects.ListProjects(
            project_service_pb2.ListProjectsRequest(page_size=2, page_token=token)
        )
        names += [found.name for found in page.projects]
        sizes.append(len(page.projects))
        last, token = token, page.next_page_token
        if not token:
            break
    assert (names, sizes) == ([f"p{number}" for number in range(5)], [2, 2, 1])
    for request in (
        project_service_pb2.ListProjectsRequest(page_token=last, name_contains="p"),
        project_service_pb2.ListProjectsRequest(page_token=last[:-2] + "AA"),
        project_service_pb2.ListProjectsRequest(page_token="nonsense!"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.projects.ListProjects(request)
        assert reason_of(caught.value) == "PAGE_TOKEN_INVALID"


async def test_an_uploaded_dataset_is_kept_once_and_deleted_for_good(client: Client, tmp_path: Path) -> None:
    first = await client.upload("rows")
    assert (first.num_examples, first.format, first.size_bytes) == (8, "prompt-completion", len(ROWS))
    assert (await client.upload("rows")).dataset_id == first.dataset_id
    second = await client.upload("same-bytes")
    assert second.dataset_id != first.dataset_id
    preview = await client.datasets.PreviewDataset(
        dataset_service_pb2.PreviewDatasetRequest(dataset_id=first.dataset_id, num_rows=2)
    )
    assert [(row.line, json.loads(row.json)["prompt"]) for row in preview.rows] == [(1, "q0"), (2, "q1")]
    blob = tmp_path / "control" / "blobs" / first.sha256[:2] / first.sha256
    await client.datasets.DeleteDataset(dataset_service_pb2.DeleteDatasetRequest(dataset_id=first.dataset_id))
    assert blob.exists()
    await client.datasets.DeleteDataset(dataset_service_pb2.DeleteDatasetRequest(dataset_id=second.dataset_id))
    assert not blob.exists()
    assert list((tmp_path / "control" / "blobs" / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "header", "code", "reason"),
    [
        (b'{"prompt": "q", "completion": "a"}\n{broken\n', {}, grpc.StatusCode.INVALID_ARGUMENT, "DATASET_MALFORMED"),
        (b"", {}, grpc.StatusCode.INVALID_ARGUMENT, "DATASET_EMPTY"),
        (ROWS, {"sha256": "0" * 64}, grpc.StatusCode.INVALID_ARGUMENT, "CHECKSUM_MISMATCH"),
        (ROWS, {"size_bytes": 3}, grpc.StatusCode.INVALID_ARGUMENT, "CHECKSUM_MISMATCH"),
        (ROWS, {"name": "../x"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        (ROWS, {"size_bytes": 10**15}, grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE"),
        (b'{"weather": "fine"}\n', {}, grpc.StatusCode.INVALID_ARGUMENT, "DATASET_FORMAT_UNKNOWN"),
    ],
)
async def test_a_bad_upload_is_refused_and_leaves_nothing(
    client: Client, tmp_path: Path, content: bytes, header: dict[str, object], code: grpc.StatusCode, reason: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.upload("bad", content, **header)
    assert (caught.value.code(), reason_of(caught.value)) == (code, reason)
    if reason == "DATASET_MALFORMED":
        assert any("2" in field for field in violated_fields(caught.value))
    assert (await client.datasets.ListDatasets(dataset_service_pb2.ListDatasetsRequest())).datasets == []
    blobs = tmp_path / "control" / "blobs"
    assert [path for path in blobs.rglob("*") if path.is_file() and len(path.name) == 64] == []


async def test_a_client_that_is_still_sending_reads_why_it_was_refused(client: Client) -> None:
    # grpc/grpc#36066: an asyncio client whose write fails as the call ends reports INTERNAL and no reason.
    refused = await asyncio.gather(*(client.upload("../x", b"x" * 64 * 100) for _ in range(40)), return_exceptions=True)
    assert {reason_of(error) for error in refused if isinstance(error, grpc.aio.AioRpcError)} == {"INVALID_FIELD"}
    assert len(refused) == 40


async def test_an_upload_that_is_given_up_leaves_nothing(client: Client, tmp_path: Path) -> None:
    staging = tmp_path / "control" / "blobs" / "staging"
    call = client.datasets.UploadDataset(timeout=60)
    header = dataset_service_pb2.UploadDatasetHeader(name="rows", sha256="0" * 64, size_bytes=10**9)
    await call.write(dataset_service_pb2.UploadDatasetRequest(header=header))
    await call.write(dataset_service_pb2.UploadDatasetRequest(chunk=b"x" * 1000))
    await until(lambda: list(staging.iterdir()) != [])
    call.cancel()
    await until(lambda: list(staging.iterdir()) == [])


async def test_an_upload_that_falls_silent_is_cut_off(tmp_path: Path) -> None:
    async with control(tmp_path / "control", upload_idle_seconds=0.2) as client:
        header = dataset_service_pb2.UploadDatasetHeader(name="rows", sha256="0" * 64, size_bytes=10)
        call = client.datasets.UploadDataset(timeout=60)
        await call.write(dataset_service_pb2.UploadDatasetRequest(header=header))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert reason_of(caught.value) == "DEADLINE_TOO_SHORT"


async def test_files_are_registered_below_the_import_root_only(tmp_path: Path) -> None:
    imports = tmp_path / "imports"
    (imports / "sub").mkdir(parents=True)
    (imports / "sub" / "rows.jsonl").write_bytes(ROWS)
    (tmp_path / "secret.jsonl").write_bytes(ROWS)
    (imports / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    async with control(tmp_path / "control", import_root=imports) as client:

        async def register(path: str) -> object:
            return await client.datasets.RegisterDataset(
                dataset_service_pb2.RegisterDatasetRequest(name="rows", path=path), timeout=60
            )

        for path in ("../secret.jsonl", str(tmp_path / "secret.jsonl"), "link.jsonl", "sub", "sub/../../secret.jsonl"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await register(path)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, path
            assert reason_of(caught.value) == "PATH_NOT_ALLOWED"
        answer = await register("sub/rows.jsonl")
        assert answer.dataset.sha256 == hashlib.sha256(ROWS).hexdigest()  # type: ignore[attr-defined]
    async with control(tmp_path / "other") as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.datasets.RegisterDataset(
                dataset_service_pb2.RegisterDatasetRequest(name="rows", path="sub/rows.jsonl"), timeout=60
            )
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_models_and_nodes_are_what_the_node_reported(client: Client, node: FakeGpuNode) -> None:
    models = await client.models.ListModels(model_service_pb2.ListModelsRequest())
    assert [(model.name, list(model.nodes)) for model in models.models] == [(MODEL, ["fake"])]
    types = await client.models.ListModelTypes(model_service_pb2.ListModelTypesRequest())
    assert [(found.model_type, list(found.config_types)) for found in types.model_types] == [("llama", ["llama"])]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.models.GetModel(model_service_pb2.GetModelRequest(name="org/none"))
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    drained = await client.nodes.DrainNode(node_service_pb2.DrainNodeRequest(name="fake"))
    assert drained.node.draining
    assert [device.name for device in drained.node.devices] == ["cpu"]


async def test_watches_have_a_cap_of_their_own(tmp_path: Path, node: FakeGpuNode) -> None:
    async with control(tmp_path / "control", node, max_watches=1) as client:
        await client.until_node_reachable()
        node.hold_at_step = 1
        await client.upload("rows")
        created = await client.create_project(dataset_id=1)
        job = await client.start_training(created.project_id)
        watch = client.jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=job.job_id), timeout=60)
        assert await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [event async for event in client.events(job.job_id)]
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(caught.value) == "TOO_MANY_REQUESTS"
        assert (await client.job(job.job_id)).job_id == job.job_id
        await node.release()


async def test_health_and_reflection_answer_for_every_service(client: Client) -> None:
    health: Any = health_pb2_grpc.HealthStub(client.channel)
    for name in ("", "tunesmith.control.v1.JobService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    channel: Any = client.channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def requests() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async for response in stub.ServerReflectionInfo(requests()):
        names = {service.name for service in response.list_services_response.service}
    assert {f"tunesmith.control.v1.{name}Service" for name in ("Project", "Dataset", "Model", "Job", "Node")} < names
    assert "grpc.health.v1.Health" in names


async def test_an_unknown_method_is_unimplemented(client: Client) -> None:
    channel: Any = client.channel
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/tunesmith.control.v1.JobService/Nope")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_everything_wrong_with_a_request_is_said_at_once(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.projects.CreateProject(
            project_service_pb2.CreateProjectRequest(project=project(dataset_id=0, name="", base_model="nothing"))
        )
    assert {"project.name", "project.base_model", "project.traits[0].datasets[0].dataset_id"} <= set(
        violated_fields(caught.value)
    )
