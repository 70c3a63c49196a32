"""Use cases that look into a dataset: its rows as they are stored, as a base will see them, and its tokens. Nodes
render and count; nothing is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from control_service.app.blob_push import push_missing_blobs
from control_service.app.datasets import get_dataset
from control_service.app.model_nodes import node_with_model, time_left
from control_service.app.ports import BlobStore, Clock, InspectDataset, NodeDirectory
from control_service.app.store_ports import Store
from control_service.domain.artifact import FileReference
from control_service.domain.dataset import Dataset, DatasetInspection, DatasetRow, TokenStatistics
from control_service.domain.dataset_rows import preview_rows
from control_service.domain.errors import Internal, ResourceExhausted


async def count_tokens(
    dataset_id: int,
    base_model: str,
    *,
    timeout_seconds: float | None = None,
    store: Store,
    nodes: NodeDirectory,
    blobs: BlobStore,
    clock: Clock,
) -> tuple[Dataset, TokenStatistics]:
    """A dataset and what it comes to by a base's tokenizer, counted on a node that has the base; pushing the rows there
    counts into `timeout_seconds`. NotFound DATASET_NOT_FOUND; FailedPrecondition NO_NODE, MODEL_NOT_FOUND; else what
    the node refuses with."""
    left = time_left(timeout_seconds, clock)
    dataset = await get_dataset(dataset_id, store=store)
    question = InspectDataset(dataset=dataset.reference(), base_model=base_model, count_tokens=True)
    found = await _inspect(question, left, nodes=nodes, blobs=blobs)
    if found.tokens is None:
        raise Internal("INTERNAL", "the node counted no tokens although it was asked to")
    return dataset, found.tokens


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How rows are to be rendered. Empty and 0 mean what a plan would take."""

    base_model: str
    chat_template: str = ""
    loss_on: str = ""
    max_length: int = 0


async def preview_dataset(
    dataset_id: int,
    *,
    num_rows: int,
    rendering: Rendering | None = None,
    timeout_seconds: float | None = None,
    store: Store,
    nodes: NodeDirectory,
    blobs: BlobStore,
    clock: Clock,
) -> Sequence[DatasetRow]:
    """The first rows as they are stored, fewer when they are large; with `rendering` also as a base will see them.
    Fails as `count_tokens` does, with the node's CHAT_TEMPLATE_MISSING, and ResourceExhausted TOO_LARGE when not even
    the first row's render fits an answer."""
    left = time_left(timeout_seconds, clock)
    dataset = await get_dataset(dataset_id, store=store)

    def preview() -> Sequence[DatasetRow]:
        with blobs.open_blob(dataset.sha256) as stream:
            return preview_rows(stream, num_rows=num_rows)

    rows = await asyncio.to_thread(preview)
    if rendering is None:
        return rows
    question = InspectDataset(
        dataset=dataset.reference(),
        base_model=rendering.base_model,
        chat_template=rendering.chat_template,
        loss_on=rendering.loss_on,
        max_length=rendering.max_length,
        num_rows=len(rows),
    )
    found = await _inspect(question, left, nodes=nodes, blobs=blobs)
    if len(found.rows) > len(rows):
        raise Internal("INTERNAL", f"the node rendered {len(found.rows)} rows of {len(rows)}")
    if rows and not found.rows:
        raise ResourceExhausted(
            "TOO_LARGE",
            f"line {rows[0].line}: the row is too large to be shown rendered; give a smaller max_length",
            details={"line": str(rows[0].line), "field": "max_length"},
        )
    # A node ends where its answer would be too large.
    return [replace(row, rendered=rendered) for row, rendered in zip(rows, found.rows, strict=False)]


async def _inspect(
    question: InspectDataset, left: Callable[[], float | None], *, nodes: NodeDirectory, blobs: BlobStore
) -> DatasetInspection:
    _, client = await node_with_model(question.base_model, nodes)
    dataset = question.dataset
    file = FileReference(path="", sha256=dataset.sha256, size_bytes=dataset.size_bytes)
    await push_missing_blobs(client, blobs, [file])
    return await client.inspect_dataset(question, timeout_seconds=left())
