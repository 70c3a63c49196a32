"""The use case of trying out what was trained: finds what answers and a node that can, pushes the adapter, hands on the
parts. Stores nothing, and keeps no node from training: a node that has a run refuses, and the next is asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from control_service.app.blob_push import push_missing_blobs
from control_service.app.lookups import job_of
from control_service.app.models import models_by_name
from control_service.app.ports import BlobStore, NodeClient, NodeDirectory
from control_service.app.store_ports import Store, Transaction
from control_service.domain.artifact import Artifact, ArtifactKind
from control_service.domain.errors import (
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    TunesmithError,
    Unavailable,
)
from control_service.domain.generation import (
    ADAPTER_FILES,
    ChatMessage,
    GeneratedPart,
    GenerationRequest,
    GenerationSource,
)
from control_service.domain.job import Job
from control_service.domain.node import NodeView
from control_service.domain.queue_policy import can_train

# This node does not answer now, and another may.
_NOT_NOW: frozenset[str] = frozenset({"NODE_BUSY", "NODE_DRAINING", "NODE_UNREACHABLE"})
_RETRY_AFTER_SECONDS = 5.0


async def generate(
    source: GenerationSource,
    messages: Sequence[ChatMessage],
    sampling: Mapping[str, Any],
    *,
    store: Store,
    nodes: NodeDirectory,
    blobs: BlobStore,
) -> AsyncGenerator[tuple[str, GeneratedPart], None]:
    """(node, part) of an answer; closing it ends the generation on its node.

    NotFound JOB_NOT_FOUND, ARTIFACT_NOT_FOUND; FailedPrecondition NO_NODE, MODEL_NOT_FOUND, NOT_OFFERED (the job
    trained a whole model); ResourceExhausted NODE_BUSY; else what the node refuses with.
    """
    found = await store.read(lambda tx: _request_of(tx, source))
    request = replace(found, messages=tuple(messages), sampling=sampling)
    refusal: TunesmithError | None = None
    for name, client in await _candidates(request, nodes):
        try:
            await push_missing_blobs(client, blobs, request.adapter_files)
        except Unavailable as error:
            refusal = error
            continue
        async with aclosing(client.generate(request)) as parts:
            try:
                first = await anext(parts, None)
            except TunesmithError as error:
                if error.reason not in _NOT_NOW:
                    raise _for_callers(error) from error
                # Of several refusals the one that says to come back is told.
                refusal = error if refusal is None or error.reason == "NODE_BUSY" else refusal
                continue
            if first is None:
                raise Internal("INTERNAL", f"node {name} ended an answer before it began")
            yield name, first
            async for part in parts:
                yield name, part
            return
    if refusal is not None and refusal.reason == "NODE_UNREACHABLE":
        raise refusal
    why = refusal.message if refusal else "no node takes questions now"
    raise ResourceExhausted("NODE_BUSY", f"runs go first: {why}", retry_after_seconds=_RETRY_AFTER_SECONDS)


def _request_of(tx: Transaction, source: GenerationSource) -> GenerationRequest:
    if not source.job_id:
        return GenerationRequest(base_model=source.base_model)
    job = job_of(tx, source.job_id)
    settings = job.spec.hyperparameters
    request = GenerationRequest(
        base_model=job.spec.base_model,
        weights_digest=job.weights_digest,
        model_type=job.spec.model_type,
        training_type=job.spec.training_type,
        quantization=settings.get("quantization", {}),
        chat_template=settings.get("chat_template", ""),
    )
    if source.base_only:
        return request
    adapter = _adapter_of(job, tx.artifacts.list_for_job(job.job_id))
    files = tuple(file for file in adapter.files if file.path in ADAPTER_FILES)
    return replace(request, adapter_files=files)


def _adapter_of(job: Job, artifacts: Sequence[Artifact]) -> Artifact:
    for artifact in artifacts:
        if artifact.kind is ArtifactKind.ADAPTER:
            return artifact
    if any(artifact.kind is ArtifactKind.MODEL for artifact in artifacts):
        raise FailedPrecondition(
            "NOT_OFFERED",
            f"job {job.job_id} trained a whole model; put its artifact `model` below the nodes' models directory, "
            "and ask it as a base model",
            details={"job_id": job.job_id},
        )
    state = job.state.value
    raise NotFound(
        "ARTIFACT_NOT_FOUND",
        f"job {job.job_id} is {state} and has no adapter"
        + ("" if job.is_over else "; it can be asked when the job has SUCCEEDED"),
        details={"job_id": job.job_id, "state": state},
    )


async def _candidates(request: GenerationRequest, nodes: NodeDirectory) -> Sequence[tuple[str, NodeClient]]:
    """Reachable nodes with the base, best first. FailedPrecondition NO_NODE, MODEL_NOT_FOUND."""
    if not any(view.is_reachable for view in nodes.views()):
        raise FailedPrecondition("NO_NODE", "no node is reachable")
    having = _having(request, nodes.views())
    if not having:
        # The model may have been put there a moment ago.
        await nodes.refresh()
        having = _having(request, nodes.views())
    if not having:
        available = ",".join(sorted(models_by_name(nodes.views())))
        raise FailedPrecondition(
            "MODEL_NOT_FOUND",
            f"no reachable node has {request.base_model}"
            + (" with the weights that the job was trained on" if request.weights_digest else "")
            + f"; there are: {available or 'none'}",
            details={"model": request.base_model, "available_models": available},
        )
    return [(name, client) for name in having if (client := nodes.client(name)) is not None]


def _having(request: GenerationRequest, views: Sequence[NodeView]) -> list[str]:
    """By name where there is no other reason: one that takes runs now has a free device, and may hold the base."""
    having = [
        view for view in views if view.is_reachable and can_train(view, request.base_model, request.weights_digest)
    ]
    ranked = sorted(
        having,
        key=lambda view: (
            view.is_draining,
            view.report is None or not view.report.accepting,
            view.resident_base_model != request.base_model,
        ),
    )
    return [view.node.name for view in ranked]


def _for_callers(error: TunesmithError) -> TunesmithError:
    """A base that a node lacks after all is a state of the nodes here, not what the caller named."""
    if error.reason != "MODEL_NOT_FOUND":
        return error
    return FailedPrecondition(error.reason, error.message, details=error.details)
