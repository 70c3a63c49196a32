"""Brings runs and engines together: hands a run over, stops it, and sees that it is closed when its engine let go.

Refuses to write a journal that an engine or shim may write: it closes only runs that no engine has and none will close.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextvars import copy_context
from dataclasses import replace
from typing import Any

import structlog

from gpu_service.domain.memory import MemoryLedger
from gpu_service.journal import JournalFull
from gpu_service.journal.failpoints import failpoint
from gpu_service.runs.admission import Admission
from gpu_service.runs.engine import Engine
from gpu_service.runs.engine_directories import NO_ENDING, EngineStartFailed
from gpu_service.runs.engine_pool import EnginePool
from gpu_service.runs.memory_records import MemoryRecords
from gpu_service.runs.room import FULL
from gpu_service.runs.run import Run
from gpu_service.runs.shim_client import ShimGone
from gpu_service.runs.signal import Signal, wait_for
from gpu_service.runs.spares import SpareKeeper
from gpu_service.shim.closing import close_run
from gpu_service.shim.records import ExitRecord

_log = structlog.get_logger(__name__)
_SWEEP_SECONDS = 2.0


class Launcher:
    """Owns the tasks that carry runs to and from engines. `changed` fires when one was handed over or let go."""

    def __init__(
        self,
        *,
        admission: Admission,
        ledger: MemoryLedger,
        memory: MemoryRecords,
        pool: EnginePool,
        changed: Signal,
        grace_seconds: float,
    ) -> None:
        """`grace_seconds` is for older attempts that a newer one pushes out."""
        self._admission = admission
        self._ledger = ledger
        self._memory = memory
        self._pool = pool
        self._changed = changed
        self._grace_seconds = grace_seconds
        self._tasks: set[asyncio.Task[None]] = set()
        # Ids of runs that met an engine on its way out, and are on their way to another.
        self._second_tries: set[str] = set()
        pool.on_run_left = self._run_left
        self._spares = SpareKeeper(
            pool=pool,
            devices=admission.devices,
            is_free=lambda device_id: ledger.holder_of(device_id) is None and admission.problem() is None,
        )

    def begin(self, run: Run, leaving: Sequence[Run]) -> None:
        """Hand the run to an engine once those that are leaving have left. The device is the run's already."""
        self.note_model(run)
        self._spawn(self._launch(run, leaving), f"launch-{run.key.id}", run)

    def note_model(self, run: Run) -> None:
        """Engines that come up without work expect another run on this base."""
        self._pool.settings.recent_model.directory = str(run.content.get("model_directory", ""))

    async def take_up(self, run: Run, older: Sequence[Run]) -> None:
        """Go on with a run that a former server accepted and that is not over."""
        engine = self._pool.engine_of(run)
        if engine is None and run.summary.last_run_sequence > 0:
            _log.warning("run-without-engine", **run.log_ids)
            await self._close_without_engine(run, NO_ENDING)
            return
        for other in older:
            self._ledger.release(other.key.id)
        self._ledger.reserve(
            run_id=run.key.id, device_id=run.device_id, num_bytes=0, capacity_bytes=0, host_bytes=run.host_bytes
        )
        if engine is None:
            self.begin(run, older)

    async def stop(self, run: Run, mode: str, grace_seconds: float) -> None:
        """Have the run's engine told to end it; a run that has none yet ends without one."""
        _log.info("run-stop", mode=mode, grace_seconds=grace_seconds, **run.log_ids)
        run.note_stop(mode, grace_seconds)
        engine = self._pool.engine_of(run)
        if engine is not None:
            await self._pass_stop(engine, run)

    @staticmethod
    async def _pass_stop(engine: Engine, run: Run) -> None:
        try:
            await engine.stop(run)
        except ShimGone:
            # Its end closes the run; who asked asks again until the run is over.
            _log.info("stop-met-dead-shim", engine=engine.id, **run.log_ids)

    def lingers(self, run: Run) -> bool:
        """Whether the run is over but not everything of it is settled: its engine is still on its way to the next, or
        has let go of it just now, and the device is still the run's.
        """
        return run.is_over and (self._pool.engine_of(run) is not None or self._ledger.holds(run.key.id))

    def needs_device(self, run: Run) -> bool:
        """Whether the run, or its engine on its behalf, still is on its device."""
        return not run.is_over or self.lingers(run)

    async def wait_until_left(self, run: Run) -> None:
        """Until the run is over and its engine is ready for another."""
        while True:
            changed = self._changed.current()
            if not self.needs_device(run):
                return
            await wait_for(changed, _SWEEP_SECONDS)

    async def _launch(self, run: Run, leaving: Sequence[Run]) -> None:
        for other in leaving:
            if not other.is_over:
                await self.stop(other, "cancel", self._grace_seconds)
        for other in leaving:
            await self.wait_until_left(other)
        device = next((device for device in await self._admission.devices() if device.id == run.device_id), None)
        if device is None:
            await self._close_without_engine(run, replace(NO_ENDING, note=f"device {run.device_id} is gone"))
            return
        wanted = {
            "base_model": str(run.content["spec"].get("base_model", "")),
            "weights_digest": run.weights_digest,
            "quantization": str(run.content.get("quantization", "")),
        }
        try:
            engine = None if run.stop_mode else await self._pool.acquire(device, wanted)
        except EngineStartFailed as error:
            _log.error("engine-start-failed", error=str(error))
            await self._close_without_engine(run, error.ending)
            return
        except OSError as error:
            _log.error("engine-start-failed", error=str(error))
            ending = replace(NO_ENDING, disk_full=error.errno in FULL, note=str(error))
            await self._close_without_engine(run, ending)
            return
        if engine is None or run.stop_mode is not None:
            # Stopped before any engine had it.
            await self._close_without_engine(run, NO_ENDING)
            return
        try:
            failpoint("launch.before-start-run")
            await engine.start(run)
            failpoint("launch.after-start-run")
        except ShimGone:
            _log.info("start-met-dead-shim", engine=engine.id)
            if self._pool.engine_of(run) is None:
                # Its end was dealt with before it had the run, so nobody else will.
                await self._try_again(run, NO_ENDING)
                return
        if run.stop_mode is not None:
            await self._pass_stop(engine, run)
        self._changed.fire()

    async def _close_without_engine(self, run: Run, ending: ExitRecord) -> None:
        """Close a run that no engine has, and that no engine or shim will close."""
        ending = replace(ending, run_directory=str(run.directory), stop_mode=run.stop_mode)
        while True:
            try:
                await asyncio.to_thread(close_run, run.directory, ending)
                break
            except (JournalFull, OSError) as error:
                # A full disk, for one, gets free again; until then nobody may take the run for over, or its device.
                _log.error("run-not-closed", error=str(error))
                await asyncio.sleep(_SWEEP_SECONDS)
        await run.refresh()
        self._left(run)

    def _run_left(self, run: Run, ending: ExitRecord) -> None:
        """An engine let go of the run."""
        self._spawn(self._settle(run, ending), f"settle-{run.key.id}", run)

    async def _settle(self, run: Run, ending: ExitRecord) -> None:
        await run.refresh()
        if not run.is_over:
            await self._try_again(run, ending)
            return
        await self._memory.learn(run)
        self._left(run)

    async def _try_again(self, run: Run, ending: ExitRecord) -> None:
        """The engine ended before it had begun the run: another one gets it, once; that costs the job no retry."""
        began = run.summary.last_run_sequence > 0 or ending.run_directory is not None
        if began or run.stop_mode is not None or run.key.id in self._second_tries:
            await self._close_without_engine(run, ending)
            return
        _log.warning("run-met-dying-engine", status=ending.status, signal=ending.signal)
        self._second_tries.add(run.key.id)
        self.begin(run, [])

    def _left(self, run: Run) -> None:
        self._second_tries.discard(run.key.id)
        self._ledger.release(run.key.id)
        self._changed.fire()

    def watch_over(self, live_runs: Callable[[], Sequence[Run]]) -> None:
        """From now on make up for notices that were lost with a shim, and retire engines whose time is over."""
        self._spawn(self._sweep(live_runs), "sweep")

    async def _sweep(self, live_runs: Callable[[], Sequence[Run]]) -> None:
        while True:
            await self._spares.look()
            await asyncio.sleep(_SWEEP_SECONDS)
            for run in live_runs():
                run.wake()
            await self._pool.retire()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str, run: Run | None = None) -> None:
        """Every line that the work logs is about `run`."""
        # A copy keeps the id of the request that caused it.
        context = copy_context()
        if run is not None:
            context.run(structlog.contextvars.bind_contextvars, **run.log_ids)
        task: asyncio.Task[None] = asyncio.create_task(work, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._task_done, context=context)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("task-failed", task=task.get_name(), exc_info=task.exception())

    async def end_spares(self) -> None:
        """No engine comes up any more that no run waits for."""
        await self._spares.end()

    async def close(self) -> None:
        """Drop what is under way; engines with work or a base are left as they are."""
        await self.end_spares()
        await self._spares.dismiss()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
