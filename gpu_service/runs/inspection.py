"""Shows a dataset as a base would see it, by a planner. Keeps nothing, and tokenizes nothing in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.models import ModelShelf
from gpu_service.runs.node_files import NodeFiles
from gpu_service.runs.planner_process import PlannerProcess
from gpu_service.runs.run_files import blob_not_found


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectRequest:
    """`dataset` is a `DatasetReference` as proto JSON. Empty and 0 mean the defaults of a run."""

    dataset: Mapping[str, Any]
    base_model: str
    chat_template: str
    loss_on: str
    max_length: int
    num_rows: int
    count_tokens: bool


class Inspection:
    """Counting and the node's plans wait for each other, since both tokenize all they can; a look at rows does not."""

    def __init__(self, *, files: NodeFiles, models: ModelShelf, blobs: BlobStore, planner: PlannerProcess) -> None:
        self._files = files
        self._models = models
        self._blobs = blobs
        self._planner = planner

    async def inspect(self, request: InspectRequest) -> dict[str, Any]:
        """`rows` and, if asked for, `tokens` of an `InspectDatasetResponse` as proto JSON.

        Raises `Refusal`: MODEL_NOT_FOUND, BLOB_NOT_FOUND, CHAT_TEMPLATE_MISSING, DATASET_MALFORMED naming the line, and
        what else a plan on these rows would be refused with. Cancelling it kills the planner.
        """
        model = await self._models.read(request.base_model)
        async with self._planner.turn(short=not request.count_tokens):
            # Until it was read it must not be deleted to make room.
            missing = await self._blobs.find_missing([str(request.dataset.get("sha256", ""))])
            if missing:
                raise blob_not_found([digest for digest, _ in missing])
            answer = await self._planner.ask(
                {
                    "inspect": {
                        "dataset": dict(request.dataset),
                        "base_model": model.name,
                        "chat_template": request.chat_template,
                        "loss_on": request.loss_on,
                        "max_length": request.max_length,
                        "num_rows": request.num_rows,
                        "count_tokens": request.count_tokens,
                    },
                    "model_directory": str(model.directory),
                    "blobs_directory": str(self._files.blobs),
                    "cache_directory": str(self._files.cache),
                },
                answer="inspected",
            )
        return {name: value for name, value in answer.items() if name != "type"}
