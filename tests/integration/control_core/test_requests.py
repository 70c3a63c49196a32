"""request_id, group commit, and use cases of projects, data sets and nodes on the real database."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from control_service.app import dataset_inspection, datasets, models, nodes, projects, training
from control_service.app.idempotency import RequestKey
from control_service.app.ports import PlanLevel
from control_service.domain.errors import (
    Aborted,
    AlreadyExists,
    DeadlineTooShort,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from control_service.domain.job_state import JobState
from tests.fakes.control_core import draft, until
from tests.fakes.control_node import FakeNode
from tests.integration.control_core.conftest import OpenCore


def _request(digest: str = "d") -> RequestKey:
    return RequestKey(method="StartTraining", request_id="same", body_digest=digest)


async def test_parallel_calls_with_one_request_id_make_one_job(open_core: OpenCore) -> None:
    node = FakeNode("a")
    node.is_up = False
    core = await open_core(node)
    project = await core.project()
    started = await asyncio.gather(*(core.start(project.project_id, request=_request()) for _ in range(32)))
    assert len({job.job_id for job in started}) == 1
    page = await core.store.read(lambda tx: tx.jobs.list_page(before_job_id="", limit=100, project_id=0, states=()))
    assert len(page) == 1
    with pytest.raises(AlreadyExists) as refused:
        await core.start(project.project_id, request=_request("other"))
    assert refused.value.reason == "REQUEST_ID_REUSED"
    await core.restart()
    assert (await core.start(project.project_id, request=_request())).job_id == started[0].job_id


async def test_a_refused_plan_writes_no_job_and_no_request(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    node.plan_error = InvalidArgument("COMBINATION_NOT_ALLOWED", "qlora does not go with none")
    with pytest.raises(InvalidArgument, match="COMBINATION_NOT_ALLOWED"):
        await core.start(project.project_id, request=_request())
    assert not await core.store.read(lambda tx: tx.jobs.list_page(before_job_id="", limit=9, project_id=0, states=()))
    node.plan_error = None
    assert (await core.start(project.project_id, request=_request())).state is JobState.QUEUED


async def test_a_base_that_is_nowhere_is_refused_with_those_that_are(open_core: OpenCore) -> None:
    node = FakeNode("a", models=("org/base", "org/other"))
    core = await open_core(node)
    await core.reachable()
    project = await core.project(base_model="org/absent")
    with pytest.raises(FailedPrecondition) as refused:
        await core.start(project.project_id)
    assert refused.value.reason == "MODEL_NOT_FOUND"
    assert refused.value.details["available_models"] == "org/base,org/other"
    # One that was put there a moment ago is found.
    node.models.append("org/absent")
    await core.start(project.project_id)


async def test_planning_exactly_pushes_the_data_first(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    project = await core.project()
    result = await training.plan_training(
        project.project_id,
        level=PlanLevel.EXACT,
        store=core.store,
        nodes=core.runtime.nodes,
        blobs=core.blobs,
        clock=core.clock,
    )
    assert result.node == "a"
    assert set(core.blobs.blobs) <= set(node.blobs)


async def test_a_node_gets_no_more_time_to_check_than_the_caller_has(open_core: OpenCore) -> None:
    nodes = FakeNode("a"), FakeNode("b")
    core = await open_core(*nodes)
    await core.reachable()
    for node in nodes:
        node.plan_error = DeadlineTooShort("DEADLINE_TOO_SHORT", "planning took longer")
        node.start_error = ResourceExhausted("NODE_BUSY", "not now")
    job = await core.start((await core.project()).project_id, timeout_seconds=5.0)
    first, second = nodes[0].plan_timeouts + nodes[1].plan_timeouts
    assert first is not None
    assert second is not None
    assert 0.0 < second < first <= 5.0
    # Nobody refused it, so it waits, and is checked by the node that it goes to.
    assert (await core.view(job.job_id)).job.is_over is False


async def test_waiting_writes_share_commits(open_core: OpenCore) -> None:
    core = await open_core()
    before = core.store.num_commits
    dataset = await core.dataset()
    drafts = [draft(f"project {n}", dataset.dataset_id) for n in range(100)]
    await asyncio.gather(*(projects.create_project(d, store=core.store, clock=core.clock) for d in drafts))
    assert len(await projects.list_projects(store=core.store, limit=200)) == 100
    assert core.store.num_commits - before < 60


async def test_one_bad_write_in_a_group_undoes_only_itself(open_core: OpenCore) -> None:
    core = await open_core()
    dataset = await core.dataset()
    drafts = [draft("twin", dataset.dataset_id), draft("twin", dataset.dataset_id), draft("other", dataset.dataset_id)]
    results = await asyncio.gather(
        *(projects.create_project(d, store=core.store, clock=core.clock) for d in drafts), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, AlreadyExists)]
    assert [error.reason for error in refused] == ["PROJECT_NAME_TAKEN"]
    assert [p.draft.name for p in await projects.list_projects(store=core.store)] == ["twin", "other"]


async def test_projects_are_updated_by_field_and_etag(open_core: OpenCore) -> None:
    core = await open_core()
    project = await core.project()
    assert project.draft.output_directory == "out"
    changed = await projects.update_project(
        project.project_id,
        replace(project.draft, model_type="mistral", training_type="standard"),
        fields=("training_type",),
        etag=project.etag,
        store=core.store,
        clock=core.clock,
    )
    assert (changed.draft.training_type, changed.draft.model_type) == ("full", "llama")
    with pytest.raises(Aborted, match="ETAG_MISMATCH"):
        await projects.update_project(
            project.project_id, project.draft, etag=project.etag, store=core.store, clock=core.clock
        )
    with pytest.raises(InvalidArgument, match="update_mask"):
        await projects.update_project(
            project.project_id, project.draft, fields=("project_id",), store=core.store, clock=core.clock
        )


async def test_unknown_datasets_are_refused_and_used_ones_kept(open_core: OpenCore) -> None:
    core = await open_core()
    with pytest.raises(NotFound) as missing:
        await projects.create_project(draft("p", 7), store=core.store, clock=core.clock)
    assert (missing.value.reason, missing.value.details["dataset_id"]) == ("DATASET_NOT_FOUND", "7")
    project = await core.project()
    number = project.draft.traits[0].datasets[0].dataset_id
    with pytest.raises(FailedPrecondition, match="DATASET_IN_USE"):
        await datasets.delete_dataset(number, store=core.store, blobs=core.blobs, clock=core.clock)
    await projects.delete_project(project.project_id, store=core.store, clock=core.clock)
    await datasets.delete_dataset(number, store=core.store, blobs=core.blobs, clock=core.clock)
    assert core.blobs.blobs == {}


async def test_a_project_with_a_live_job_stays(open_core: OpenCore) -> None:
    node = FakeNode("a")
    node.is_up = False
    core = await open_core(node)
    project = await core.project()
    job = await core.start(project.project_id)
    with pytest.raises(FailedPrecondition, match="PROJECT_HAS_LIVE_JOBS"):
        await projects.delete_project(project.project_id, store=core.store, clock=core.clock)
    await core.cancel(job.job_id)
    await projects.delete_project(project.project_id, store=core.store, clock=core.clock)
    assert (await core.view(job.job_id)).job.project_name == "project"


async def test_uploads(open_core: OpenCore) -> None:
    core = await open_core()
    first = await core.dataset("set")
    assert await core.dataset("set") == first
    with pytest.raises(AlreadyExists, match="DATASET_NAME_TAKEN"):
        await core.dataset("set", num_rows=4)
    twin = await core.upload("twin", b"".join(json.dumps({"text": f"set {n}"}).encode() + b"\n" for n in range(3)))
    assert twin.sha256 == first.sha256
    await datasets.delete_dataset(first.dataset_id, store=core.store, blobs=core.blobs, clock=core.clock)
    rows = await dataset_inspection.preview_dataset(
        twin.dataset_id,
        num_rows=2,
        store=core.store,
        nodes=core.runtime.nodes,
        blobs=core.blobs,
        clock=core.clock,
    )
    assert [(row.line, json.loads(row.json)["text"]) for row in rows] == [(1, "set 0"), (2, "set 1")]
    with pytest.raises(InvalidArgument) as malformed:
        await core.upload("bad", b'{"text": "good"}\n{"text": }\n')
    assert malformed.value.reason == "DATASET_MALFORMED"
    assert malformed.value.violations[0].field == "line 2, column 10"
    assert core.blobs.staged == {}
    assert [d.name for d in await datasets.list_datasets(store=core.store)] == ["twin"]


async def test_a_drained_nodes_job_goes_on_elsewhere_from_its_checkpoint(open_core: OpenCore) -> None:
    first, second = FakeNode("a"), FakeNode("b")
    core = await open_core(first, second)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    assert (await core.running(job.job_id)).node == "a"
    await nodes.drain_node("a", interrupt=True, store=core.store, nodes=core.runtime.nodes, clock=core.clock)
    moved = await core.until_job(job.job_id, lambda j: j.attempt == 2 and j.state is JobState.RUNNING)
    assert (moved.node, moved.num_retries) == ("b", 0)
    resume = second.run(job.job_id, 2).request.resume_from
    assert resume is not None
    assert (resume.step, len(resume.files)) == (10, 1)
    status = await nodes.list_nodes(store=core.store, nodes=core.runtime.nodes)
    assert {s.view.node.name: (s.view.is_draining, s.job_ids) for s in status} == {
        "a": (True, ()),
        "b": (False, (job.job_id,)),
    }
    undone = await nodes.drain_node("a", undo=True, store=core.store, nodes=core.runtime.nodes, clock=core.clock)
    assert not undone.view.is_draining
    with pytest.raises(NotFound, match="NODE_NOT_FOUND"):
        await nodes.drain_node("nobody", store=core.store, nodes=core.runtime.nodes, clock=core.clock)


async def test_a_node_may_be_registered_while_control_runs_and_may_move(open_core: OpenCore) -> None:
    core = await open_core(FakeNode("a"), FakeNode("b"), configure=False)
    for address in ("a", "b"):
        await nodes.register_node("it", address, store=core.store, nodes=core.runtime.nodes, clock=core.clock)

        def is_there(address: str = address) -> bool:
            view = core.runtime.nodes.view("it")
            return view is not None and view.report is not None and view.report.node_name == address

        await until(is_there)


async def test_models_of_reachable_nodes(open_core: OpenCore) -> None:
    core = await open_core(FakeNode("a", models=("org/x",)), FakeNode("b", models=("org/x", "org/y")))
    await core.reachable()
    listed = models.list_models(nodes=core.runtime.nodes)
    assert [(view.model.name, view.nodes) for view in listed] == [("org/x", ("a", "b")), ("org/y", ("b",))]
    assert models.list_model_types(nodes=core.runtime.nodes)[0].config_types == ("llama",)
    with pytest.raises(NotFound) as refused:
        models.get_model("org/z", nodes=core.runtime.nodes)
    assert refused.value.details["available_models"] == "org/x,org/y"
