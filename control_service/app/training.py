"""Use cases that ask for training: plan, start, retry. Nothing is dispatched here; a commit wakes the scheduler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from control_service.app.blob_push import blobs_of_spec, push_missing_blobs
from control_service.app.idempotency import RequestKey, earlier_reference, once
from control_service.app.lookups import datasets_of, job_of, project_of, refuse_missing_datasets
from control_service.app.model_nodes import nodes_with_model, some_nodes_with_model, time_left
from control_service.app.plan_asking import ask_in_turn
from control_service.app.ports import BlobStore, Clock, EventCodec, IdSource, NodeClient, NodeDirectory, PlanLevel
from control_service.app.queue import JobQueue
from control_service.app.start_points import StartRequest, check_same_base, find_start
from control_service.app.store_ports import Store, Transaction
from control_service.app.transitions import insert_job
from control_service.domain.errors import invalid_field
from control_service.domain.job import Job, JobView
from control_service.domain.job_state import CAN_RETRY, check_verb
from control_service.domain.project import Project, dataset_ids
from control_service.domain.spec import TrainingSpec


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """`plan` is `Plan` as proto JSON with proto field names; `node` planned it."""

    plan: Mapping[str, Any]
    node: str


async def plan_training(
    project_id: int,
    *,
    level: PlanLevel = PlanLevel.EXACT,
    probe_memory: bool = False,
    timeout_seconds: float | None = None,
    store: Store,
    nodes: NodeDirectory,
    blobs: BlobStore,
    clock: Clock,
) -> PlanResult:
    """Resolves a project on a node that has its base; pushing its data counts into `timeout_seconds`. NotFound
    PROJECT_NOT_FOUND; FailedPrecondition NO_NODE, MODEL_NOT_FOUND (`available_models`, `nodes`); Unavailable
    NODE_UNREACHABLE, also just after control began; DeadlineTooShort DEADLINE_TOO_SHORT; else what the node refuses
    with. A node whose devices are too small is passed over for the next; so is one that is busy, when memory is to be
    probed. InvalidArgument INVALID_FIELD for a probe at level CHECK."""
    if probe_memory and level is not PlanLevel.EXACT:
        raise invalid_field("probe_memory", "memory is probed at level EXACT only")
    left = time_left(timeout_seconds, clock)
    _, spec = await store.read(lambda tx: _snapshot(tx, project_id))

    async def ask(client: NodeClient) -> Mapping[str, Any]:
        if level is PlanLevel.EXACT:
            await push_missing_blobs(client, blobs, blobs_of_spec(spec))
        return await client.plan_run(spec=spec, level=level, probe_memory=probe_memory, timeout_seconds=left())

    planned = await ask_in_turn(await some_nodes_with_model(spec.base_model, nodes), ask, passes_silent=False)
    assert planned is not None
    return PlanResult(node=planned[0], plan=planned[1])


async def start_training(
    project_id: int,
    *,
    priority: int = 0,
    max_retries: int = 2,
    start: StartRequest | None = None,
    timeout_seconds: float | None = None,
    store: Store,
    nodes: NodeDirectory,
    queue: JobQueue,
    clock: Clock,
    ids: IdSource,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Stores a job in state QUEUED; `start` has it begin with what an earlier job left (fails as `find_start` and
    `check_same_base` do). Fails as `plan_training` at level CHECK does, and then writes no job; with no node
    reachable, or none that answers within `timeout_seconds`, the job waits and is checked when it is dispatched."""
    now = clock.utc_now()
    left = time_left(timeout_seconds, clock)

    def earlier_or_snapshot(tx: Transaction) -> Job | TrainingSpec:
        reference = earlier_reference(tx, request)
        return snapshot(tx)[1] if reference is None else job_of(tx, reference)

    def snapshot(tx: Transaction) -> tuple[Project, TrainingSpec, str]:
        project, spec = _snapshot(tx, project_id)
        if start is None:
            return project, spec, ""
        point = find_start(tx, start)
        check_same_base(point, spec.base_model)
        return project, replace(spec, start_from=point.value), point.weights_digest

    found = await store.read(earlier_or_snapshot)
    if isinstance(found, Job):
        return await queue.view_of(found)
    await check_plan(found, nodes, left)

    def work(tx: Transaction) -> Job:
        def insert() -> tuple[str, Job]:
            # The project is read again: it may have changed while a node was asked. Its dispatch plans it again.
            project, spec, weights_digest = snapshot(tx)
            job_id = ids.new_id()
            job = Job(
                job_id=job_id,
                project_id=project_id,
                project_name=project.draft.name,
                spec=spec,
                spec_digest=spec.digest(),
                output_path=f"{project.draft.output_directory}/{job_id}",
                create_time=now,
                priority=priority,
                max_retries=max_retries,
                weights_digest=weights_digest,
            )
            insert_job(tx, job, codec=codec, now=now)
            return job_id, job_of(tx, job_id)

        return once(tx, request, now, work=insert, replay=lambda reference: job_of(tx, reference))

    return await queue.view_of_stored(await store.transact(work))


async def retry_job(
    job_id: str,
    *,
    store: Store,
    queue: JobQueue,
    clock: Clock,
    ids: IdSource,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Queues a new job with the snapshot of one that failed or was cancelled. FailedPrecondition JOB_STATE; NotFound
    DATASET_NOT_FOUND when a dataset of the snapshot was deleted."""
    now = clock.utc_now()

    def work(tx: Transaction) -> Job:
        def insert() -> tuple[str, Job]:
            earlier = job_of(tx, job_id)
            check_verb("retry", earlier.state, CAN_RETRY)
            refuse_missing_datasets(tx, [reference.dataset_id for reference in earlier.spec.datasets])
            new_id = ids.new_id()
            job = Job(
                job_id=new_id,
                project_id=earlier.project_id,
                project_name=earlier.project_name,
                spec=earlier.spec,
                spec_digest=earlier.spec_digest,
                output_path=f"{earlier.output_path.rpartition('/')[0]}/{new_id}",
                create_time=now,
                priority=earlier.priority,
                max_retries=earlier.max_retries,
                retry_of_job_id=earlier.job_id,
                # What it starts from was made on these weights.
                weights_digest=earlier.weights_digest if earlier.spec.start_from else "",
            )
            insert_job(tx, job, codec=codec, now=now, message=f"retry of job {earlier.job_id}")
            return new_id, job_of(tx, new_id)

        return once(tx, request, now, work=insert, replay=lambda reference: job_of(tx, reference))

    return await queue.view_of_stored(await store.transact(work))


def _snapshot(tx: Transaction, project_id: int) -> tuple[Project, TrainingSpec]:
    project = project_of(tx, project_id)
    datasets = datasets_of(tx, dataset_ids(project.draft.traits))
    return project, project.spec([dataset.reference() for dataset in datasets])


async def check_plan(spec: TrainingSpec, nodes: NodeDirectory, left: Callable[[], float | None]) -> None:
    """Raises what a node refuses the spec with. Asks the next node when one does not answer, or has too little memory;
    none answers: passes."""

    def ask(client: NodeClient) -> Awaitable[Mapping[str, Any]]:
        return client.plan_run(spec=spec, level=PlanLevel.CHECK, timeout_seconds=left())

    await ask_in_turn(await nodes_with_model(spec.base_model, nodes), ask, passes_silent=True)
