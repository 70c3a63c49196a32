"""The use case that queues an export: what a finished job trained, written in another form by a job of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from control_service.app.idempotency import RequestKey, earlier_reference, once
from control_service.app.lookups import job_of
from control_service.app.model_nodes import time_left
from control_service.app.ports import Clock, EventCodec, IdSource, NodeDirectory
from control_service.app.queue import JobQueue
from control_service.app.start_points import StartPoint, StartRequest, find_start
from control_service.app.store_ports import Store, Transaction
from control_service.app.training import check_plan
from control_service.app.transitions import insert_job
from control_service.domain.job import Job, JobView
from control_service.domain.job_state import CAN_EXPORT, check_verb
from control_service.domain.spec import TrainingSpec

_TASK = "export"
# What base and adapter are loaded by, and what goes along with them; the rest was about training.
_KEPT = ("quantization", "lora", "chat_template")
# A wrong merge is wrong again.
_MAX_RETRIES = 1


async def export_artifact(
    job_id: str,
    format: str,
    *,
    max_logit_difference: float | None = None,
    timeout_seconds: float | None = None,
    store: Store,
    nodes: NodeDirectory,
    queue: JobQueue,
    clock: Clock,
    ids: IdSource,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Stores a job that only exports. FailedPrecondition JOB_STATE; NotFound JOB_NOT_FOUND, ARTIFACT_NOT_FOUND; else
    what a node refuses it with: NOT_OFFERED, COMBINATION_NOT_ALLOWED."""
    now = clock.utc_now()
    left = time_left(timeout_seconds, clock)

    def find(tx: Transaction) -> StartPoint:
        check_verb("export", job_of(tx, job_id).state, CAN_EXPORT)
        return find_start(tx, StartRequest(job_id=job_id))

    def earlier_or_start(tx: Transaction) -> Job | StartPoint:
        reference = earlier_reference(tx, request)
        return find(tx) if reference is None else job_of(tx, reference)

    found = await store.read(earlier_or_start)
    if isinstance(found, Job):
        return await queue.view_of(found)
    await check_plan(_spec(found, format, max_logit_difference), nodes, left)

    def work(tx: Transaction) -> Job:
        def insert() -> tuple[str, Job]:
            start = find(tx)
            earlier, spec, new_id = start.earlier, _spec(start, format, max_logit_difference), ids.new_id()
            job = Job(
                job_id=new_id,
                project_id=earlier.project_id,
                project_name=earlier.project_name,
                spec=spec,
                spec_digest=spec.digest(),
                output_path=f"{earlier.output_path.rpartition('/')[0]}/{new_id}",
                create_time=now,
                priority=earlier.priority,
                max_retries=_MAX_RETRIES,
                weights_digest=start.weights_digest,
            )
            insert_job(tx, job, codec=codec, now=now, message=f"export of job {earlier.job_id}")
            return new_id, job_of(tx, new_id)

        return once(tx, request, now, work=insert, replay=lambda reference: job_of(tx, reference))

    return await queue.view_of_stored(await store.transact(work))


def _spec(start: StartPoint, format: str, max_logit_difference: float | None) -> TrainingSpec:
    """The earlier job's spec without its data: nothing of it is trained on."""
    earlier = start.earlier.spec
    kept = {name: earlier.hyperparameters[name] for name in _KEPT if name in earlier.hyperparameters}
    hyperparameters: dict[str, Any] = {**kept, "exports": [format]}
    if max_logit_difference is not None:
        hyperparameters["max_export_logit_difference"] = max_logit_difference
    return replace(
        earlier,
        task=_TASK,
        start_from=start.value,
        hyperparameters=hyperparameters,
        traits=(),
        datasets=(),
        mix={},
        sample_prompts=(),
    )
