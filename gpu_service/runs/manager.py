"""Starts, stops, lists and releases runs; fences attempts; brings runs and engines together.

The node's only decider: one start at a time, every decision durable before an engine hears of it. Refuses to write a
journal that an engine or shim may write; it closes only runs that no engine ever had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from gpu_service.domain import fencing
from gpu_service.domain.errors import Fault, Refusal, refuse_user
from gpu_service.domain.memory import MemoryLedger
from gpu_service.runs.admission import Admission, Admitted
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.engine import Engine
from gpu_service.runs.engine_pool import NO_ENDING, EnginePool, EngineSettings, EngineStartFailed
from gpu_service.runs.node_files import NodeFacts, NodeFiles, RunKey
from gpu_service.runs.run import Run
from gpu_service.runs.run_files import ResumeRequest, find_file, prepare_resume, remove_tree
from gpu_service.runs.shim_client import ShimGone
from gpu_service.runs.signal import Signal, wait_for
from gpu_service.shim.closing import close_run
from gpu_service.shim.records import ExitRecord

_log = structlog.get_logger(__name__)
_SWEEP_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRequest:
    """An attempt that a control service wants started."""

    key: RunKey
    spec_digest: str
    # `TrainingSpec` as proto JSON with proto names.
    spec: Mapping[str, Any]
    # Empty: none is pinned yet.
    weights_digest: str
    resume: ResumeRequest | None


class RunManager:
    """All runs of this node. `changed` fires whenever a run's state, phase or files change, or the node's own state."""

    def __init__(
        self,
        *,
        files: NodeFiles,
        facts: NodeFacts,
        admission: Admission,
        ledger: MemoryLedger,
        blobs: BlobStore,
        pool: EnginePool,
        settings: EngineSettings,
    ) -> None:
        self._files = files
        self._facts = facts
        self._admission = admission
        self._ledger = ledger
        self._blobs = blobs
        self._pool = pool
        pool.on_run_left = self._run_left
        self._settings = settings
        self._runs: dict[str, Run] = {}
        self._starting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.draining = False
        # True once nothing more will change: standing streams end.
        self.finished = False
        self.changed = Signal()

    # Start-up and the end.

    async def open(self) -> None:
        """Read every run, adopt every engine, bury the dead, and start what was accepted but never had an engine."""
        for directory, content in await asyncio.to_thread(self._files.read_runs):
            run = Run(directory=directory, content=content, on_change=self.changed.fire)
            await run.refresh()
            self._runs[run.key.id] = run
            highest = self._facts.highest_attempts.get(run.key.job_id, 0)
            if run.key.attempt > highest:
                # The server ended between the run's file and its own.
                self._facts = self._facts.with_attempt(run.key)
        await self._pool.adopt({str(run.directory): run for run in self._runs.values()})
        for run in sorted(self._runs.values(), key=lambda run: run.key.attempt):
            await run.refresh()
            if not run.is_over:
                await self._take_up(run)
        self._spawn(self._sweep(), "sweep")

    async def _take_up(self, run: Run) -> None:
        engine = self._pool.engine_of(run)
        if engine is None and run.summary.last_run_sequence > 0:
            _log.warning("run-without-engine", run=run.key.id)
            await self._close_without_engine(run, NO_ENDING)
            return
        older = self._older_of(run.key)
        for other in older:
            self._ledger.release(other.key.id)
        self._ledger.reserve(run_id=run.key.id, device_id=run.device_id, num_bytes=0, capacity_bytes=0)
        if engine is None:
            self._spawn(self._launch(run, older), f"launch-{run.key.id}")

    def _lingers(self, run: Run) -> bool:
        return run.is_over and self._pool.engine_of(run) is not None

    def _older_of(self, key: RunKey) -> list[Run]:
        """Attempts of the same job before this one that are not over."""
        return [
            run
            for run in self._runs.values()
            if run.key.job_id == key.job_id and run.key.attempt < key.attempt and not run.is_over
        ]

    async def drain(self, grace_seconds: float) -> None:
        """Take no more runs; every engine checkpoints and leaves within the grace, or is killed by its shim."""
        self.begin_draining()
        for run in self._runs.values():
            if not run.is_over and run.stop_mode is None:
                run.note_stop("checkpoint", grace_seconds)
        await self._pool.shut_down(grace_seconds)
        # Runs that were on their way to an engine see the stop and end without one; that engine leaves too.
        await asyncio.gather(*(run.wait_until_over() for run in self._runs.values() if not run.is_over))
        await self._pool.shut_down(grace_seconds)

    def begin_draining(self) -> None:
        """Refuse further runs from now on."""
        self.draining = True
        self.changed.fire()

    def finish(self) -> None:
        """Tell standing streams that this was the last of it."""
        self.finished = True
        self.changed.fire()

    async def close(self) -> None:
        """Let go of engines and journals; nothing is stopped."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._pool.leave_alone()
        for run in self._runs.values():
            await run.close()

    # What the API asks for.

    async def start(self, request: StartRequest) -> Run:
        """Accept an attempt, or find it here already. Raises `Refusal`."""
        request.key.check()
        async with self._starting:
            key = request.key
            if self._facts.installation_id not in ("", key.installation_id):
                raise Refusal(
                    "WRONG_INSTALLATION", Fault.PLATFORM, "this node belongs to another installation's control service"
                )
            known = self._runs.get(key.id)
            admission = fencing.admit(
                attempt=key.attempt,
                spec_digest=request.spec_digest,
                highest_attempt=self._facts.highest_attempts.get(key.job_id, 0),
                known_digest=known.spec_digest if known else None,
            )
            if known is not None and admission is fencing.Admission.SAME_RUN:
                return known
            if self.draining:
                raise Refusal("NODE_DRAINING", Fault.PLATFORM, "this node is draining")
            # Runs that are over, but whose engine is still on its way to the next, count as leaving too.
            leaving = [*self._older_of(key), *(run for run in self._runs.values() if self._lingers(run))]
            admitted = await self._admission.admit(
                run_id=key.id,
                spec=request.spec,
                spec_digest=request.spec_digest,
                weights_digest=request.weights_digest,
                leaving_run_ids=[run.key.id for run in leaving],
            )
            try:
                run = await self._accept(request, admitted)
            except BaseException:
                # Whatever kept it from the disk, the device is free again; the error goes on to the caller.
                self._ledger.release(key.id)
                raise
        _log.info("run-accepted", device=run.device_id)
        self._spawn(self._launch(run, leaving), f"launch-{key.id}")
        return run

    async def _accept(self, request: StartRequest, admitted: Admitted) -> Run:
        key = request.key
        resume = None
        if request.resume is not None:
            resume = await asyncio.to_thread(
                prepare_resume,
                request.resume,
                job_directory=self._files.runs / key.job_id,
                target=self._files.run_directory(key) / "resume",
                blob_path=self._blobs.path,
            )
        content = {
            "installation_id": key.installation_id,
            "job_id": key.job_id,
            "attempt": key.attempt,
            "spec_digest": request.spec_digest,
            "spec": dict(request.spec),
            "weights_digest": admitted.weights_digest,
            "model_directory": admitted.model_directory,
            "blobs_directory": str(self._files.blobs),
            "cache_directory": str(self._files.cache),
            "device": {"type": admitted.device.type, "index": admitted.device.index},
            "quantization": admitted.quantization,
            "resume": resume,
        }
        directory = await asyncio.to_thread(self._files.write_run, key, content)
        facts = self._facts.with_attempt(key)
        await asyncio.to_thread(self._files.write_facts, facts)
        self._facts = facts
        run = self._runs[key.id] = Run(directory=directory, content=content, on_change=self.changed.fire)
        self.changed.fire()
        return run

    async def stop(self, key: RunKey, mode: str, grace_seconds: float) -> Run:
        """Ask a run to end; gives it as it stands. One that is over is not changed. Raises `Refusal` RUN_NOT_FOUND."""
        run = self.get(key)
        if not run.is_over:
            await self._stop(run, mode, grace_seconds or self._settings.grace_seconds)
        return run

    async def _stop(self, run: Run, mode: str, grace_seconds: float) -> None:
        _log.info("run-stop", run=run.key.id, mode=mode, grace_seconds=grace_seconds)
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
            _log.info("stop-met-dead-shim", engine=engine.id)

    def get(self, key: RunKey) -> Run:
        """Raises `Refusal` RUN_NOT_FOUND, also for a run of another installation."""
        run = self._runs.get(key.id)
        if run is None or run.key.installation_id != key.installation_id:
            raise refuse_user("RUN_NOT_FOUND", f"this node has no run {key.id}", field="key")
        return run

    def list_runs(self, installation_id: str) -> list[Run]:
        """Runs of an installation that were not released, by job and attempt."""
        runs = [run for run in self._runs.values() if run.key.installation_id == installation_id]
        return sorted(runs, key=lambda run: (run.key.job_id, run.key.attempt))

    async def release(self, key: RunKey) -> int:
        """Delete a run that is over; gives the bytes freed, 0 when it is not here. Raises `Refusal` JOB_STATE."""
        key.check()
        run = self._runs.get(key.id)
        if run is None or run.key.installation_id != key.installation_id:
            return 0
        if not run.is_over:
            raise Refusal("JOB_STATE", Fault.USER, f"run {key.id} is not over", field="key")
        await self._wait_until_left(run)
        if self._runs.pop(key.id, None) is None:
            return 0
        await run.close()
        self.changed.fire()
        async with self._starting:
            # Nobody makes a directory of this job meanwhile.
            doomed = await asyncio.to_thread(self._files.discard_run, key)
        return await asyncio.to_thread(remove_tree, doomed)

    async def find_file(self, sha256: str) -> Path | None:
        """A blob, or a file of a run's artifacts or checkpoints, with this content."""
        blob = self._blobs.path(sha256)
        if await asyncio.to_thread(blob.is_file):
            return blob
        return await asyncio.to_thread(find_file, [run.directory for run in self._runs.values()], sha256)

    async def accepting(self) -> bool:
        """Whether a run can be started now."""
        return not self.draining and await self._admission.has_room()

    @property
    def resident_base_model(self) -> str:
        return self._pool.resident_base_model

    # Bringing runs and engines together.

    async def _launch(self, run: Run, leaving: list[Run]) -> None:
        structlog.contextvars.bind_contextvars(job_id=run.key.job_id, attempt=run.key.attempt)
        for other in leaving:
            if not other.is_over:
                await self._stop(other, "cancel", self._settings.grace_seconds)
        for other in leaving:
            await self._wait_until_left(other)
        device = next(device for device in await self._admission.devices() if device.id == run.device_id)
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
            await self._close_without_engine(run, replace(NO_ENDING, note=str(error)))
            return
        if engine is None or run.stop_mode is not None:
            # Stopped before any engine had it.
            await self._close_without_engine(run, NO_ENDING)
            return
        try:
            await engine.start(run)
        except ShimGone:
            _log.info("start-met-dead-shim", engine=engine.id)
            if self._pool.engine_of(run) is None:
                # Its end was dealt with before it had the run, so nobody else will close it.
                await self._close_without_engine(run, NO_ENDING)
                return
        if run.stop_mode is not None:
            await self._pass_stop(engine, run)
        self.changed.fire()

    async def _wait_until_left(self, run: Run) -> None:
        """Until the run is over and its engine is ready for another."""
        while True:
            changed = self.changed.current()
            if run.is_over and not self._lingers(run):
                return
            await wait_for(changed, _SWEEP_SECONDS)

    async def _close_without_engine(self, run: Run, ending: ExitRecord) -> None:
        """Close a run that no engine has, and that no engine or shim will close."""
        ending = replace(ending, run_directory=str(run.directory), stop_mode=run.stop_mode)
        await asyncio.to_thread(close_run, run.directory, ending)
        await run.refresh()
        self._left(run)

    def _run_left(self, run: Run, ending: ExitRecord) -> None:
        """An engine let go of the run."""
        self._spawn(self._settle(run, ending), f"settle-{run.key.id}")

    async def _settle(self, run: Run, ending: ExitRecord) -> None:
        await run.refresh()
        if not run.is_over:
            # The engine ended before its shim had heard of the run.
            await self._close_without_engine(run, ending)
            return
        self._left(run)

    def _left(self, run: Run) -> None:
        self._ledger.release(run.key.id)
        self.changed.fire()

    async def _sweep(self) -> None:
        """Notices can be lost with a shim; this makes up for them, and retires idle engines."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            for run in self._runs.values():
                if not run.is_over:
                    run.wake()
            await self._pool.retire_idle()

    def _spawn(self, work: Any, name: str) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("task-failed", task=task.get_name(), exc_info=task.exception())
