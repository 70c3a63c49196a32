"""Use cases that ask for training: plan, start, retry. Nothing is dispatched here; a commit wakes the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from control_service.app.idempotency import RequestKey
from control_service.app.ports import BlobStore, Clock, EventCodec, IdSource, NodeDirectory, PlanLevel
from control_service.app.store_ports import Store
from control_service.domain.job import JobView


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """`plan` is `Plan` as proto JSON with proto field names; `node` planned it."""

    plan: Mapping[str, Any]
    node: str


async def plan_training(
    project_id: int,
    *,
    level: PlanLevel = PlanLevel.EXACT,
    timeout_seconds: float | None = None,
    store: Store,
    nodes: NodeDirectory,
    blobs: BlobStore,
) -> PlanResult:
    """Resolves a project on a node that has its base. NotFound PROJECT_NOT_FOUND; FailedPrecondition NO_NODE,
    MODEL_NOT_FOUND (`available_models`, `nodes`); else what the node refuses with."""
    raise NotImplementedError


async def start_training(
    project_id: int,
    *,
    priority: int = 0,
    max_retries: int = 2,
    store: Store,
    nodes: NodeDirectory,
    clock: Clock,
    ids: IdSource,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Stores a job in state QUEUED. Fails as `plan_training` at level CHECK does, and then writes no job; with no node
    reachable the job waits with NO_NODE."""
    raise NotImplementedError


async def retry_job(
    job_id: str,
    *,
    store: Store,
    nodes: NodeDirectory,
    clock: Clock,
    ids: IdSource,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Queues a new job with the snapshot of one that failed or was cancelled. FailedPrecondition JOB_STATE."""
    raise NotImplementedError
