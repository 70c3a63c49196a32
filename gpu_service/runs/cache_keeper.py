"""Decides when room is made in the node's cache, and what runs and planners need of it meanwhile.

Looks at start, whenever a run began to train or let go of its device, when the disk was full, and now and then. Refuses
to look while a run is being accepted or a plan is being made: what these find in the cache must stay until they say so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from gpu_service.domain.spec import TrainingSpec, spec_digest
from gpu_service.runs import cache
from gpu_service.runs.cache import Protected
from gpu_service.runs.node_files import NodeFiles
from gpu_service.runs.planning import Planning
from gpu_service.runs.run import Run
from gpu_service.runs.signal import Signal, wait_for

_log = structlog.get_logger(__name__)
# Pushes and plans that no run follows fill the disk as well.
_LOOK_ANYWAY_SECONDS = 300.0
# Of the cache, when the disk is full; whoever found no room asks again, and it is halved again.
_KEPT_WHEN_FULL = 0.5


class CacheKeeper:
    """One task that makes room."""

    def __init__(
        self,
        *,
        files: NodeFiles,
        max_bytes: int,
        planning: Planning,
        starting: asyncio.Lock,
        live_runs: Callable[[], Sequence[Run]],
        changed: Signal,
    ) -> None:
        """`starting` is held while a run is accepted; `live_runs` gives those that an engine may still need."""
        self._files = files
        self._max_bytes = max_bytes
        self._planning = planning
        self._starting = starting
        self._live_runs = live_runs
        self._changed = changed
        self._task: asyncio.Task[None] | None = None
        self._disk_is_full = False

    def begin(self) -> None:
        self._task = asyncio.create_task(self._keep(), name="cache-keeper")

    def note_full_disk(self) -> None:
        """Something found no room on the disk: what can be had again goes first, whatever the cache's limit."""
        self._disk_is_full = True
        self._changed.fire()

    async def close(self) -> None:
        """What is in the trash by then is deleted at the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            seen = self._situation()
            try:
                await self.make_room()
            except OSError as error:
                _log.error("cache-not-kept", error=str(error))
            try:
                async with asyncio.timeout(_LOOK_ANYWAY_SECONDS):
                    await self._wait_for_another(seen)
            except TimeoutError:
                continue

    async def _wait_for_another(self, seen: frozenset[tuple[str, bool]]) -> None:
        while True:
            changed = self._changed.current()
            if self._disk_is_full or self._situation() != seen:
                return
            await wait_for(changed, _LOOK_ANYWAY_SECONDS)

    def _situation(self) -> frozenset[tuple[str, bool]]:
        return frozenset((run.key.id, run.may_plan) for run in self._live_runs())

    async def make_room(self) -> int:
        """Bring the cache within its limit as far as its users allow; gives the bytes freed. Raises OSError."""
        async with self._planning.at_rest(), self._starting:
            live = self._live_runs()
            protected = Protected(
                blobs={sha256 for run in live for sha256 in TrainingSpec.from_json(run.spec).contents},
                spec_digests={spec_digest(run.spec) for run in live},
                planners_rest=not any(run.may_plan for run in live),
            )
            share = _KEPT_WHEN_FULL if self._disk_is_full else 1.0
            self._disk_is_full = False
            doomed = await asyncio.to_thread(cache.make_room, self._files, self._max_bytes, protected, kept_share=share)
        freed_bytes = await asyncio.to_thread(cache.delete, doomed)
        if doomed:
            _log.info("cache-made-room", num_entries=len(doomed), freed_bytes=freed_bytes)
        return freed_bytes
