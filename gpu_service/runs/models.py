"""The base models of this node with their weights digests, which take long to compute the first time.

Refuses to hold up a listing for a digest: it is empty until someone had the time to compute it.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import structlog

from gpu_service.catalog import base_models
from gpu_service.catalog.base_models import BaseModel
from gpu_service.domain.errors import Refusal

_log = structlog.get_logger(__name__)
# A small model's digest is ready by then, so that even the first listing has it.
_PATIENCE_SECONDS = 1.0


class ModelShelf:
    """Models below one directory, which may change at any time."""

    def __init__(self, directory: Path, *, cache_file: Path) -> None:
        self._directory = directory
        self._cache_file = cache_file
        self._hashing: dict[str, asyncio.Task[str]] = {}
        # One at a time: the cache file has one writer, the disk one reader.
        self._one_at_a_time = asyncio.Lock()

    async def list_models(self) -> list[BaseModel]:
        """Every model; those that cannot be trained have a `problem`."""
        models = await asyncio.to_thread(base_models.scan, self._directory)
        tasks = {model.name: self._digest_of(model) for model in models if not model.problem}
        if tasks:
            await asyncio.wait(tasks.values(), timeout=_PATIENCE_SECONDS)
        return [_with_digest(model, tasks.get(model.name)) for model in models]

    async def read(self, name: str) -> BaseModel:
        """A model without waiting for its digest. Raises `Refusal` as `base_models.read` does."""
        model = await asyncio.to_thread(base_models.read, self._directory, name)
        task = self._digest_of(model)
        await asyncio.wait([task], timeout=_PATIENCE_SECONDS)
        return _with_digest(model, task)

    async def weights_digest(self, model: BaseModel) -> str:
        """The model's digest, however long it takes. Raises `Refusal` MODEL_INVALID."""
        return model.weights_digest or await asyncio.shield(self._digest_of(model))

    def _digest_of(self, model: BaseModel) -> asyncio.Task[str]:
        task = self._hashing.get(model.name)
        # What was computed is asked for again each time: files may have changed, and the cache makes it cheap.
        if task is None or task.done():
            task = self._hashing[model.name] = asyncio.create_task(self._compute(model), name=f"digest-{model.name}")
        return task

    async def _compute(self, model: BaseModel) -> str:
        async with self._one_at_a_time:
            return await asyncio.to_thread(base_models.weights_digest, model.directory, self._cache_file)

    async def close(self) -> None:
        """Stop computing."""
        for task in self._hashing.values():
            task.cancel()
        await asyncio.gather(*self._hashing.values(), return_exceptions=True)


def _with_digest(model: BaseModel, task: asyncio.Task[str] | None) -> BaseModel:
    if task is None or not task.done():
        return model
    error = task.exception()
    if error is None:
        return replace(model, weights_digest=task.result())
    if isinstance(error, Refusal):
        _log.warning("weights-digest-failed", model=model.name, error=str(error))
        return replace(model, problem=str(error))
    raise error
