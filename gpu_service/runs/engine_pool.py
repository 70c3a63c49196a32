"""The engines of this node, one per device: starts, reuses, adopts and retires them, for runs and for generations.

An engine that failed is never reused: its shim ends with it, and a fresh one is started for the next run. Refuses to
decide which run goes where.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from pathlib import Path
from typing import Any

import structlog

from gpu_service.devices import Device
from gpu_service.journal.failpoints import failpoint
from gpu_service.runs.burials import Burials
from gpu_service.runs.engine import Engine
from gpu_service.runs.engine_directories import (
    NO_ENDING,
    EngineSettings,
    EngineStartFailed,
    end_shim,
    ending_with_log,
    make,
    needs_burial,
    remove_ended,
)
from gpu_service.runs.inference_stream import Generation, draining, given_up, hung, lost
from gpu_service.runs.quarantine import Quarantine
from gpu_service.runs.run import Run
from gpu_service.runs.shim_client import Message, ShimGone, is_alive, kill_shim
from gpu_service.shim.configuration import EngineConfiguration, EngineDirectoryInvalid
from gpu_service.shim.records import ExitRecord, ShimRecord

_log = structlog.get_logger(__name__)
# What was killed is gone by then, unless the kernel keeps it.
_DYING_SECONDS = 5.0
# Of a device whose engine generates: all that it holds can be had for a run. More than any device has.
_EVERYTHING_BYTES = 1 << 62


class EnginePool:
    """Whoever hands runs to engines sets `on_run_left`."""

    def __init__(self, *, directory: Path, settings: EngineSettings, quarantine: Quarantine | None = None) -> None:
        self._directory = directory
        self._quarantine = quarantine or Quarantine()
        self.settings = settings
        self._burials = Burials(
            quarantine=self._quarantine,
            memory=settings.memory,
            patience_seconds=settings.answer_limit_seconds,
        )
        # Called when an engine has let go of a run: in order, or by its own ending.
        self.on_run_left: Callable[[Run, ExitRecord], None] = _nobody_listens
        self._engines: dict[str, Engine] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        # Messages to engines that are on their way, and burials.
        self._sending: set[asyncio.Task[None]] = set()
        # Whoever changes which engine a device has holds the device's lock.
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        # Called when an engine is done with a generation, is ready, or ended by itself before it had any work.
        self.on_generation_over: Callable[[], None] = lambda: None
        self.on_ready: Callable[[Engine], None] = lambda engine: None
        self.on_spare_lost: Callable[[Engine], None] = lambda engine: None

    def engine_of(self, run: Run) -> Engine | None:
        return next((engine for engine in self._engines.values() if engine.run is run), None)

    def resident_bytes(self, device_id: str) -> int:
        """What an engine without a run keeps on the device: evictable, so it counts as free."""
        engine = self._engines.get(device_id)
        if engine is not None and engine.can_take_run and engine.generations:
            return _EVERYTHING_BYTES
        return engine.held_bytes if engine is not None and engine.is_idle else 0

    @property
    def resident_base_model(self) -> str:
        """A base that is in memory now; empty when there is none."""
        return next(
            (name for engine in self._engines.values() if (name := str(engine.resident.get("base_model") or ""))), ""
        )

    async def adopt(self, runs: Mapping[str, Run]) -> None:
        """Take over every engine that a former server left, and bury the dead. `runs` is by run directory."""
        for directory in await asyncio.to_thread(lambda: sorted(self._directory.iterdir())):
            await self._adopt_one(directory, runs)
        await self._burials.look_again_at_devices(self._directory)
        await asyncio.to_thread(remove_ended, self._directory, {engine.id for engine in self._engines.values()})

    async def _adopt_one(self, directory: Path, runs: Mapping[str, Run]) -> None:
        try:
            configuration = await asyncio.to_thread(EngineConfiguration.read, directory)
        except EngineDirectoryInvalid as error:
            _log.warning("engine-directory-unusable", engine=directory.name, error=str(error))
            return
        device = configuration.device
        engine = Engine(
            directory=directory,
            device_id=f"{device['type']}:{device['index']}",
            process=None,
            on_notice=self._on_notice,
            answer_limit_seconds=self.settings.answer_limit_seconds,
        )
        deadline = time.monotonic() + self.settings.answer_limit_seconds
        while await is_alive(directory):
            try:
                status = await engine.connect()
            except ShimGone as error:
                # It is on its way in or out; the lock says when it is gone. One that hangs must not hold up a node.
                now = time.monotonic()
                if now > deadline + _DYING_SECONDS:
                    await self._keep_unreachable(engine, runs)
                    return
                if now > deadline:
                    _log.error("shim-does-not-answer", engine=engine.id, error=str(error))
                    await asyncio.to_thread(kill_shim, directory)
                await asyncio.sleep(0.1)
                continue
            # A run may be said to be over right behind the status that says it goes on.
            if status["run_directory"] != engine.last_finished:
                engine.run = runs.get(str(status["run_directory"]))
            ids = engine.run.log_ids if engine.run is not None else {}
            _log.info("engine-adopted", engine=engine.id, shim_pid=status["shim_pid"], state=status["state"], **ids)
            for generation_id in status.get("generations", ()):
                # What it holds is not known until it says that it is over.
                engine.generations[generation_id] = given_up(generation_id)
            engine.had_work = bool(engine.run or engine.generations or engine.resident)
            self._keep(engine)
            with contextlib.suppress(ShimGone):
                # A generation's reader went with the former server.
                await engine.cancel_generation(None)
            if status["run_directory"] not in (None, engine.last_finished) and engine.run is None:
                await self._ask_to_leave(engine)
            return
        if await asyncio.to_thread(needs_burial, directory, runs):
            burial = self._spawn(self._burials.bury(directory))
            await asyncio.wait({burial}, timeout=self.settings.answer_limit_seconds)
            if not burial.done():
                await self._keep_unreachable(engine, runs)

    async def _keep_unreachable(self, engine: Engine, runs: Mapping[str, Run]) -> None:
        """An engine whose shim is dead or as good as dead, and whose processes do not end: node and device go on
        without each other until they have.
        """
        record = await asyncio.to_thread(ShimRecord.read, engine.directory)
        engine.run = None if record is None else runs.get(str(record.run_directory))
        # Nothing is connected; whoever watches it waits for the lock.
        engine.client.gone.set()
        self._keep(engine)
        self._burials.quarantine(engine.device_id)

    async def acquire(self, device: Device, wanted: dict[str, str]) -> Engine:
        """An idle engine on the device that keeps the wanted base, or a new one; for a run, which ends generations.
        Raises EngineStartFailed, OSError.
        """
        async with self._changing[device.id]:
            engine = self._engines.get(device.id)
            if engine is not None:
                with contextlib.suppress(ShimGone):
                    await engine.give_up_generations()
                # Where spares are kept, an engine with another base is one: it drops that.
                if engine.can_take_run and (engine.keeps(wanted) or self.settings.keeps_spare(device.id)):
                    return engine
                await self._replace(engine)
            return await self._start(device)

    def engine_on(self, device_id: str) -> Engine | None:
        """The device's engine, if it has one."""
        return self._engines.get(device_id)

    def spares(self) -> Sequence[Engine]:
        """The engines that wait for runs where such are kept."""
        return [one for one in self._engines.values() if one.is_spare and self.settings.keeps_spare(one.device_id)]

    async def start_spare(self, device: Device, is_free: Callable[[], bool]) -> Engine | None:
        """An engine where there is none, if `is_free` then. Not to be cancelled. Raises EngineStartFailed, OSError."""
        async with self._changing[device.id]:
            return None if device.id in self._engines or not is_free() else await self._start(device)

    def keeps(self, device_id: str, wanted: dict[str, str]) -> bool:
        """Whether the device's engine has the wanted base in memory."""
        engine = self._engines.get(device_id)
        return engine is not None and engine.is_idle and bool(engine.resident) and engine.keeps(wanted)

    async def lend(
        self, device: Device, wanted: dict[str, str], generation: Generation, is_free: Callable[[], bool]
    ) -> bool:
        """Hand a generation to the device's engine, or a new one, unless it has other work; whether it was handed over.

        `is_free` is asked again after each wait. Not to be cancelled. Raises EngineStartFailed, OSError.
        """
        async with self._changing[device.id]:
            engine = self._engines.get(device.id)
            if not is_free() or (engine is not None and not engine.is_idle):
                return False
            if engine is not None and not (engine.keeps(wanted) or self.settings.keeps_spare(device.id)):
                await self._replace(engine)
                engine = None
            if engine is None and is_free():
                engine = await self._start(device)
            if engine is None or not is_free() or not engine.is_idle:
                return False
            try:
                await engine.generate(generation)
            except ShimGone:
                # Its end is on its way, and with it the generation's.
                _log.info("generate-met-dead-shim", engine=engine.id)
            return True

    def end(self, generation: Generation) -> None:
        """Nobody reads it any more: its engine is told, if it has one that is not done with it."""
        for engine in self._engines.values():
            if generation.id in engine.generations:
                self._send_soon(engine.cancel_generation(generation.id), engine)

    async def _start(self, device: Device) -> Engine:
        directory = self._directory / uuid.uuid4().hex[:12]
        process = await asyncio.to_thread(make, directory, self.settings, device)
        failpoint("spawn.after-shim")
        engine = Engine(
            directory=directory,
            device_id=device.id,
            process=process,
            on_notice=self._on_notice,
            answer_limit_seconds=self.settings.answer_limit_seconds,
        )
        try:
            status = await engine.connect()
        except ShimGone as error:
            exit_status = await asyncio.to_thread(end_shim, process)
            await self._burials.bury(directory)
            raise EngineStartFailed(await asyncio.to_thread(ending_with_log, directory, exit_status)) from error
        _log.info("engine-started", engine=engine.id, shim_pid=status["shim_pid"], device=device.id)
        self._keep(engine)
        return engine

    def _keep(self, engine: Engine) -> None:
        self._engines[engine.device_id] = engine
        # In a context of its own: an engine outlives the run and the request that it was started for.
        self._watches[engine.id] = asyncio.create_task(
            self._watch(engine), name=f"engine-{engine.id}", context=Context()
        )

    async def _watch(self, engine: Engine) -> None:
        await engine.wait_until_gone()
        run = engine.run
        ids = run.log_ids if run is not None else {}
        ending = await asyncio.to_thread(ExitRecord.read, engine.directory)
        if run is not None:
            await run.refresh()
        if ending is None or (run is not None and not run.is_over):
            stop_mode = run.stop_mode if run is not None else None
            await self._burials.bury_of_device(engine.directory, engine.device_id, stop_mode, ids)
            ending = await asyncio.to_thread(ExitRecord.read, engine.directory)
        status, signal = (ending.status, ending.signal) if ending else (None, None)
        _log.info("engine-ended", engine=engine.id, status=status, signal=signal, **ids)
        await self._burials.look_at_device(engine.directory, engine.device_id, ending or NO_ENDING)
        if ending is not None and ending.idle_seconds:
            engine.lose_generations(hung(ending.idle_seconds))
        engine.lose_generations(draining() if engine.leaving else lost("the engine ended"))
        self.on_generation_over()
        if self._engines.get(engine.device_id) is engine:
            del self._engines[engine.device_id]
        self._watches.pop(engine.id, None)
        if not engine.had_work and not engine.leaving:
            self.on_spare_lost(engine)
        # Looked at again: from here on nobody can hand it a run any more.
        run = engine.run
        if run is not None:
            await run.refresh()
            engine.run = None
            self.on_run_left(run, ending or NO_ENDING)
        await asyncio.to_thread(remove_ended, self._directory, {engine.id for engine in self._engines.values()})

    def _on_notice(self, engine: Engine, message: Message) -> None:
        if message["type"] == "generated":
            engine.take_generated(message)
            engine.leaving = engine.leaving or bool(message.get("ends_engine"))
            if message.get("done"):
                self.on_generation_over()
            return
        if message["type"] == "run_finished":
            engine.last_finished = str(message["run_directory"])
        if message["type"] == "ready" and engine.note_ready():
            _log.info("engine-ready", engine=engine.id, device=engine.device_id)
            self.on_ready(engine)
        run = engine.run
        if run is None or message.get("run_directory", str(run.directory)) != str(run.directory):
            return
        run.wake()
        if message["type"] == "run_finished":
            engine.resident = dict(message.get("resident") or {})
            engine.run = None
            engine.idle_since = time.monotonic()
            if message.get("state") == "FAILED":
                # What a failure left in the process is unknown; many engines end by themselves now.
                engine.leaving = True
                self._send_soon(engine.shut_down(self.settings.grace_seconds), engine)
            self.on_run_left(run, NO_ENDING)

    def _send_soon(self, sending: Coroutine[Any, Any, None], engine: Engine) -> None:
        async def send() -> None:
            try:
                await sending
            except ShimGone:
                _log.info("engine-gone-already", engine=engine.id)

        self._spawn(send())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._sending.add(task := asyncio.create_task(work, context=Context()))
        task.add_done_callback(self._sending.discard)
        return task

    async def _ask(self, engine: Engine) -> None:
        """Whether the shim lives: one that is frozen is ended, and buried when it is gone."""
        try:
            stuck = await engine.ask()
            if stuck:
                # Lifted when the engine is gone.
                self._quarantine.impose(engine.device_id, stuck, lambda: False)
        except ShimGone as error:
            if not engine.client.gone.is_set():
                _log.error("shim-does-not-answer", engine=engine.id, error=str(error))
                await asyncio.to_thread(kill_shim, engine.directory)
        finally:
            engine.ask_at = time.monotonic() + self.settings.ask_seconds

    async def make_room(self, device_id: str) -> None:
        """Have an engine without a run leave the device, with what it keeps there; returns when it is gone."""
        async with self._changing[device_id]:
            engine = self._engines.get(device_id)
            # One that was asked to leave before still holds what it keeps.
            if engine is not None and engine.run is None:
                with contextlib.suppress(ShimGone):
                    await engine.give_up_generations()
                await self._replace(engine)

    async def _replace(self, engine: Engine) -> None:
        watch = self._watches.get(engine.id)
        await self._ask_to_leave(engine)
        if watch is not None:
            await asyncio.shield(watch)

    async def _ask_to_leave(self, engine: Engine) -> None:
        try:
            await engine.shut_down(self.settings.grace_seconds)
        except ShimGone:
            _log.info("engine-gone-already", engine=engine.id)

    async def retire(self) -> None:
        """Ask engines to leave that were idle for too long, or that hang behind the end of their run; ask shims whether
        they live.
        """
        now = time.monotonic()
        await self._quarantine.look()
        for engine in list(self._engines.values()):
            if engine.ask_at is not None and now >= engine.ask_at:
                engine.ask_at = None
                self._spawn(self._ask(engine))
            is_kept = engine.is_spare and self.settings.keeps_spare(engine.device_id)
            if engine.is_idle and not is_kept and now - engine.idle_since >= self.settings.idle_seconds:
                _log.info("engine-idle-too-long", engine=engine.id)
                await self._ask_to_leave(engine)
            elif engine.run is not None and engine.run.is_over and not engine.leaving:
                engine.lingers_since = engine.lingers_since or now
                if now - engine.lingers_since >= self.settings.grace_seconds:
                    _log.error("engine-hangs-after-run", engine=engine.id, **engine.run.log_ids)
                    await self._ask_to_leave(engine)

    async def shut_down(self, grace_seconds: float) -> None:
        """Ask all engines to leave, at a checkpoint, and wait until they have. The shims kill those that do not."""
        watches = list(self._watches.values())
        for engine in list(self._engines.values()):
            with contextlib.suppress(ShimGone):
                await engine.shut_down(grace_seconds)
        if watches:
            await asyncio.gather(*watches)

    async def leave_alone(self) -> None:
        """Let go of all engines; they go on without this server."""
        for task in self._sending:
            task.cancel()
        for watch in self._watches.values():
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)
        for engine in self._engines.values():
            await engine.client.close()


def _nobody_listens(run: Run, ending: ExitRecord) -> None:
    raise RuntimeError(f"nobody takes run {run.key.id} back")
