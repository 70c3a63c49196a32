"""Accepts, stops, lists and releases runs, and fences attempts.

The node's only decider: one start at a time, every decision durable before an engine hears of it. Refuses to touch
engines: the launcher brings runs to them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from gpu_service.domain import fencing
from gpu_service.domain.errors import Fault, Refusal, refuse_user
from gpu_service.domain.memory import MemoryLedger
from gpu_service.domain.spec import TrainingSpec
from gpu_service.journal.failpoints import failpoint
from gpu_service.runs.admission import Admission, Admitted
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.cache_keeper import CacheKeeper
from gpu_service.runs.engine_pool import EnginePool
from gpu_service.runs.launcher import Launcher
from gpu_service.runs.memory_records import MemoryRecords
from gpu_service.runs.node_files import NodeFacts, NodeFiles, RunKey
from gpu_service.runs.planning import Planning
from gpu_service.runs.room import full_disk_is_a_refusal
from gpu_service.runs.run import Run
from gpu_service.runs.run_files import (
    ResumeRequest,
    find_file,
    prepare_resume,
    prepare_start,
    read_trainer,
    remove_tree,
)
from gpu_service.runs.signal import Signal

_log = structlog.get_logger(__name__)


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
    """All runs of this node.

    `changed` fires whenever a run's state, phase or files change, the node's own state, or what its engines keep.
    """

    def __init__(
        self,
        *,
        files: NodeFiles,
        facts: NodeFacts,
        admission: Admission,
        ledger: MemoryLedger,
        memory: MemoryRecords,
        blobs: BlobStore,
        pool: EnginePool,
        planning: Planning,
        grace_seconds: float,
        cache_max_bytes: int,
    ) -> None:
        self._files = files
        self._facts = facts
        self._admission = admission
        self._ledger = ledger
        self._blobs = blobs
        self._pool = pool
        self._grace_seconds = grace_seconds
        self._runs: dict[str, Run] = {}
        self._starting = asyncio.Lock()
        self.draining = False
        # True once nothing more will change: standing streams end.
        self.finished = False
        self.changed = Signal()
        pool.on_generation_over = self.changed.fire
        self._launcher = Launcher(
            admission=admission,
            ledger=ledger,
            memory=memory,
            pool=pool,
            changed=self.changed,
            grace_seconds=grace_seconds,
        )
        self._cache_keeper = CacheKeeper(
            files=files,
            max_bytes=cache_max_bytes,
            planning=planning,
            starting=self._starting,
            live_runs=lambda: [run for run in self._runs.values() if self._launcher.needs_device(run)],
            changed=self.changed,
        )
        blobs.on_full = self._cache_keeper.note_full_disk

    # Start-up and the end.

    async def open(self) -> None:
        """Read every run, adopt every engine, bury the dead, and start what was accepted but never had an engine."""
        for directory, content in await asyncio.to_thread(self._files.read_runs):
            run = self._follow(directory, content)
            await run.refresh()
            highest = self._facts.highest_attempts.get(run.key.job_id, 0)
            if run.key.attempt > highest:
                # The server ended between the run's file and its own.
                self._facts = self._facts.with_attempt(run.key)
                await asyncio.to_thread(self._files.write_facts, self._facts)
        await self._pool.adopt({str(run.directory): run for run in self._runs.values()})
        for run in sorted(self._runs.values(), key=lambda run: run.key.attempt):
            await run.refresh()
            if not run.is_over:
                await self._launcher.take_up(run, self._older_of(run.key))
        if self._runs:
            self._launcher.note_model(max(self._runs.values(), key=lambda run: run.key.job_id))
        self._launcher.watch_over(lambda: [run for run in self._runs.values() if not run.is_over])
        self._cache_keeper.begin()

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
        await self._launcher.end_spares()
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
        await self._cache_keeper.close()
        await self._launcher.close()
        await self._pool.leave_alone()
        for run in self._runs.values():
            await run.close()

    # What the API asks for.

    def check_owner(self, installation_id: str) -> None:
        """A node is its first installation's for good. Raises `Refusal` WRONG_INSTALLATION."""
        if self._facts.installation_id not in ("", installation_id):
            raise Refusal(
                "WRONG_INSTALLATION", Fault.PLATFORM, "this node belongs to another installation's control service"
            )

    async def start(self, request: StartRequest) -> Run:
        """Accept an attempt, or find it here already. Raises `Refusal`."""
        request.key.check()
        async with self._starting:
            key = request.key
            self.check_owner(key.installation_id)
            known = self._runs.get(key.id)
            admission = fencing.admit(
                attempt=key.attempt,
                spec_digest=request.spec_digest,
                highest_attempt=self._facts.highest_attempts.get(key.job_id, 0),
                known_digest=known.spec_digest if known else None,
            )
            if known is not None and admission is fencing.Admission.SAME_RUN:
                return known
            self._refuse_when_draining()
            # Runs that are over, but whose engine is still on its way to the next, count as leaving too.
            leaving = [*self._older_of(key), *(run for run in self._runs.values() if self._launcher.lingers(run))]
            admitted = await self._admit(request, leaving)
            try:
                # Reading weights for the first time may take minutes, in which a drain may have begun.
                self._refuse_when_draining()
                with full_disk_is_a_refusal("the run's files"):
                    run = await self._accept(request, admitted)
            except BaseException:
                # Whatever kept it from the disk, the device is as it was before; the error goes on to the caller.
                self._ledger.release(key.id)
                displaced = admitted.displaced
                for one in leaving:
                    if displaced is not None and one.key.id == displaced.run_id and self._launcher.needs_device(one):
                        self._ledger.restore(displaced)
                        # Its exact plan may have come, or its end, while the ledger did not know it.
                        self._ledger.note_host_bytes(one.key.id, one.host_bytes)
                await asyncio.to_thread(self._files.forget_unaccepted, key)
                raise
            if self.draining:
                # It began in between, and may not know this run: it ends without an engine, or the next server has it.
                run.note_stop("checkpoint", self._grace_seconds)
        _log.info("run-accepted", device=run.device_id)
        self._launcher.begin(run, leaving)
        return run

    async def _admit(self, request: StartRequest, leaving: Sequence[Run]) -> Admitted:
        begun_by = await asyncio.to_thread(
            read_trainer,
            request.resume,
            job_directory=self._files.runs / request.key.job_id,
            blob_path=self._blobs.path,
        )
        try:
            return await self._admission.admit(
                run_id=request.key.id,
                spec=request.spec,
                spec_digest=request.spec_digest,
                weights_digest=request.weights_digest,
                leaving_run_ids=[run.key.id for run in leaving],
                begun_by=begun_by,
            )
        except Refusal as refusal:
            if refusal.reason == "DISK_FULL":
                self._cache_keeper.note_full_disk()
            raise

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise Refusal("NODE_DRAINING", Fault.PLATFORM, "this node is draining")

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
        start = await asyncio.to_thread(
            prepare_start,
            TrainingSpec.from_json(request.spec).start_from,
            target=self._files.run_directory(key) / "start",
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
            "kind_of_run": admitted.kind_of_run,
            "calibrations": admitted.calibrations,
            "trainer": admitted.trainer,
            "host_bytes": admitted.host_bytes,
            "resume": resume,
            "start_from": start,
        }
        directory = await asyncio.to_thread(self._files.write_run, key, content)
        facts = self._facts.with_attempt(key)
        failpoint("accept.between-files")
        await asyncio.to_thread(self._files.write_facts, facts)
        failpoint("accept.after-files")
        self._facts = facts
        run = self._follow(directory, content)
        self.changed.fire()
        return run

    def _follow(self, directory: Path, content: dict[str, Any]) -> Run:
        """The run of a directory, among the node's from now on."""

        def note_change() -> None:
            self._ledger.note_host_bytes(run.key.id, run.host_bytes)
            self.changed.fire()

        run = Run(directory=directory, content=content, on_change=note_change)
        self._runs[run.key.id] = run
        return run

    async def stop(self, key: RunKey, mode: str, grace_seconds: float) -> Run:
        """Ask a run to end; gives it as it stands. One that is over is not changed. Raises `Refusal` RUN_NOT_FOUND."""
        run = self.get(key)
        if not run.is_over:
            await self._launcher.stop(run, mode, grace_seconds or self._grace_seconds)
        return run

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
        await self._launcher.wait_until_left(run)
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
        # The newest first: it is what is asked for, as a rule, and its disk was written last.
        directories = [run.directory for run in reversed(self._runs.values())]
        return await asyncio.to_thread(find_file, directories, sha256)

    async def accepting(self) -> bool:
        """Whether a run can be started now."""
        return not self.draining and await self._admission.has_room()

    def is_leaving(self, run_id: str) -> bool:
        """Whether the run is over, and its device is free as soon as its engine has let go of it."""
        run = self._runs.get(run_id)
        return run is not None and run.is_over

    @property
    def resident_base_model(self) -> str:
        return self._pool.resident_base_model
