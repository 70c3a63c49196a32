"""The use case of trying out what was trained: finds what answers and a node that can, pushes the adapter, hands on the
parts. Stores nothing, and keeps no node from training: a node that has a run refuses, and the next is asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from control_service.app.blob_push import push_missing_blobs
from control_service.app.inference_source import find_source
from control_service.app.model_nodes import refuse_while_connecting
from control_service.app.models import models_by_name
from control_service.app.ports import BlobStore, NodeClient, NodeDirectory
from control_service.app.store_ports import Store
from control_service.domain.errors import (
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    TunesmithError,
    Unavailable,
)
from control_service.domain.generation import (
    ChatMessage,
    GeneratedPart,
    GenerationRequest,
    GenerationSource,
)
from control_service.domain.node import NodeView
from control_service.domain.queue_policy import can_train

# This node does not answer now, and another may.
_NOT_NOW: frozenset[str] = frozenset({"NODE_BUSY", "NODE_DRAINING", "NODE_UNREACHABLE", "DISK_FULL"})
_RETRY_AFTER_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Who answers. `adapter` is `adapter`, the checkpoint whose weights they are, or empty for a base."""

    node: str
    adapter: str


async def generate(
    source: GenerationSource,
    messages: Sequence[ChatMessage],
    sampling: Mapping[str, Any],
    *,
    store: Store,
    nodes: NodeDirectory,
    blobs: BlobStore,
) -> AsyncGenerator[tuple[Answering, GeneratedPart], None]:
    """Who answers, and a part; closing it ends the generation on its node.

    NotFound JOB_NOT_FOUND, ARTIFACT_NOT_FOUND; FailedPrecondition NO_NODE, MODEL_NOT_FOUND, NOT_OFFERED (the job
    trains a whole model); ResourceExhausted NODE_BUSY, DISK_FULL (of every node that could); else what the node
    refuses with.
    """
    found = await store.read(lambda tx: find_source(tx, source))
    request = replace(found, messages=tuple(messages), sampling=sampling)
    refusal: TunesmithError | None = None
    for name, client in await _candidates(request, nodes):
        try:
            request = await _push(client, request, source, store=store, blobs=blobs)
        except (Unavailable, ResourceExhausted) as error:
            if error.reason not in _NOT_NOW:
                raise
            refusal = error if refusal is None or error.reason == "NODE_BUSY" else refusal
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
            answering = Answering(node=name, adapter=request.adapter)
            yield answering, first
            async for part in parts:
                yield answering, part
            return
    if refusal is not None and refusal.reason in ("NODE_UNREACHABLE", "DISK_FULL"):
        raise refusal
    why = refusal.message if refusal else "no node takes questions now"
    raise ResourceExhausted("NODE_BUSY", f"runs go first: {why}", retry_after_seconds=_RETRY_AFTER_SECONDS)


async def _push(
    client: NodeClient, request: GenerationRequest, source: GenerationSource, *, store: Store, blobs: BlobStore
) -> GenerationRequest:
    """Gives the node the adapter. A newer checkpoint takes an earlier one's place at any time; then it is that one."""
    try:
        await push_missing_blobs(client, blobs, request.adapter_files)
        return request
    except NotFound:
        found = await store.read(lambda tx: find_source(tx, source))
        if found.adapter == request.adapter:
            raise
    newer = replace(found, messages=request.messages, sampling=request.sampling)
    await push_missing_blobs(client, blobs, newer.adapter_files)
    return newer


async def _candidates(request: GenerationRequest, nodes: NodeDirectory) -> Sequence[tuple[str, NodeClient]]:
    """Reachable nodes with the base, best first. FailedPrecondition NO_NODE, MODEL_NOT_FOUND; Unavailable
    NODE_UNREACHABLE when that is not known yet."""
    if not any(view.is_reachable for view in nodes.views()):
        refuse_while_connecting(nodes.views())
        raise FailedPrecondition("NO_NODE", "no node is reachable")
    having = _having(request, nodes.views())
    if not having:
        # The model may have been put there a moment ago.
        await nodes.refresh()
        having = _having(request, nodes.views())
    if not having:
        refuse_while_connecting(nodes.views())
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
