"""Answers of bases and adapters on devices that no run has: checks, readies files, finds an engine, hands out parts.

A run always goes first: a device that has one, or is promised to one, is busy, and one that gets one gives the
generation up. Refuses to touch runs, and to keep an engine waiting for a reader.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import structlog

from gpu_service.devices import Device
from gpu_service.domain.checked_plan import HeldBase
from gpu_service.domain.defaults import resolve_lora
from gpu_service.domain.errors import Fault, Refusal, refuse_user
from gpu_service.domain.generation import AdapterFile, GenerationRequest
from gpu_service.domain.memory import MemoryLedger
from gpu_service.domain.spec import Hyperparameters, TrainingSpec
from gpu_service.runs.admission import Admission
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.engine_directories import EngineStartFailed
from gpu_service.runs.engine_pool import EnginePool
from gpu_service.runs.inference_stream import GeneratedPart, Generation, busy, draining
from gpu_service.runs.manager import RunManager
from gpu_service.runs.node_files import GENERATION_PREFIX, NodeFiles
from gpu_service.runs.planning import Planning
from gpu_service.runs.room import FULL, disk_full, full_disk_is_a_refusal
from gpu_service.runs.run_files import blob_not_found
from gpu_service.runs.signal import wait_for
from gpu_service.shim import durable_json

_log = structlog.get_logger(__name__)
# What an engine loads of an adapter's directory; the rest is for people.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# And of a checkpoint, whose other files are about going on with the training.
CHECKPOINT_FILES = ("weights.safetensors",)
# How long another generation is waited for: one that was cancelled ends at its next token.
_PATIENCE_SECONDS = 2.0
# A base that is not quantized is held as this training type holds it.
_AS_IT_IS = "lora"


class InferenceDesk:
    """Takes one generation a device at a time."""

    def __init__(
        self,
        *,
        files: NodeFiles,
        planning: Planning,
        admission: Admission,
        ledger: MemoryLedger,
        blobs: BlobStore,
        pool: EnginePool,
        manager: RunManager,
    ) -> None:
        self._files = files
        self._planning = planning
        self._admission = admission
        self._ledger = ledger
        self._blobs = blobs
        self._pool = pool
        self._manager = manager
        self._tasks: set[asyncio.Task[None]] = set()
        # Those of them that may be starting an engine.
        self._placing: set[asyncio.Task[None]] = set()
        # Those that somebody reads.
        self._read: set[Generation] = set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedPart, None]:
        """The answer in parts; closing it ends the generation at its next token.

        Raises `Refusal` NODE_BUSY, NODE_DRAINING, MODEL_NOT_FOUND, MODEL_INVALID, BLOB_NOT_FOUND, PROMPT_TOO_LONG,
        CHAT_TEMPLATE_MISSING, CHAT_TEMPLATE_UNUSABLE, GENERATION, INVALID_FIELD, and what a plan refuses a base with.
        """
        request.check()
        self._refuse_when_draining()
        problem = self._admission.problem()
        if problem is not None:
            raise problem
        held = await self._planning.hold_base(_spec_of(request), await self._admission.planning_device())
        _check_base(request, held)
        await self._check_adapter(request.adapter_files)
        generation_id = uuid.uuid4().hex
        generation = Generation(
            generation_id=generation_id, directory=self._files.requests / f"{GENERATION_PREFIX}{generation_id}"
        )
        # Neither half a request file nor half an engine may be left behind when the caller goes away meanwhile.
        placing = self._spawn(self._place(generation, request, held), f"place-{generation_id}")
        self._placing.add(placing)
        placing.add_done_callback(self._placing.discard)
        self._read.add(generation)
        try:
            await asyncio.shield(placing)
            async with aclosing(generation.parts()) as parts:
                async for part in parts:
                    yield part
        finally:
            self._read.discard(generation)
            # Reached at once when the caller goes away, wherever it waits; nothing here waits for the engine.
            generation.fail(busy("nobody reads it"))
            self._pool.end(generation)
            self._spawn(self._clean_up(generation, placing), f"clean-{generation_id}")

    def _refuse_when_draining(self) -> None:
        if self._manager.draining:
            raise draining()

    async def _check_adapter(self, files: Sequence[AdapterFile]) -> None:
        if not files:
            return
        wanted = _wanted(files)
        absent = [name for name in wanted if name not in {file.path for file in files}]
        if absent:
            raise refuse_user("INVALID_FIELD", f"the adapter has no {', '.join(absent)}", field="adapter_files")
        missing = await self._blobs.find_missing([file.sha256 for file in files if file.path in wanted])
        if missing:
            raise blob_not_found([digest for digest, _ in missing])

    async def _place(self, generation: Generation, request: GenerationRequest, held: HeldBase) -> None:
        """Hand it to an engine. Raises `Refusal` NODE_BUSY when no device is free, or stays taken by a generation."""
        wanted = {
            "base_model": held.base_model.name,
            "weights_digest": held.base_model.weights_digest,
            "quantization": held.quantization.method,
        }
        ends_at = time.monotonic() + _PATIENCE_SECONDS
        while True:
            changed = self._manager.changed.current()
            self._refuse_when_draining()
            if generation.is_settled:
                return
            usable = [device for device in await self._admission.devices() if not device.quarantine_reason]
            soon = [device for device in usable if self._is_free(device) or self._is_free_soon(device)]
            if not soon:
                raise busy("every device of this node has a run")
            # Where the base is already, if there is a choice.
            for device in sorted(
                filter(self._is_free, soon), key=lambda device: not self._pool.keeps(device.id, wanted)
            ):
                if await self._lend(generation, request, held, device, wanted):
                    return
            seconds = ends_at - time.monotonic()
            if seconds <= 0:
                raise busy("every device of this node that has no run answers somebody else")
            await wait_for(changed, seconds)

    def _is_free(self, device: Device) -> bool:
        return self._ledger.holder_of(device.id) is None

    def _is_free_soon(self, device: Device) -> bool:
        holder = self._ledger.holder_of(device.id)
        return holder is not None and self._manager.is_leaving(holder)

    async def _lend(
        self,
        generation: Generation,
        request: GenerationRequest,
        held: HeldBase,
        device: Device,
        wanted: dict[str, str],
    ) -> bool:
        try:
            with full_disk_is_a_refusal("the request of a generation"):
                await asyncio.to_thread(self._write, generation, request, held, device)
        except OSError as error:
            # Such as an adapter that was deleted just now to make room.
            raise Refusal("GENERATION", Fault.PLATFORM, f"the request cannot be written: {error}") from error
        try:
            return await self._pool.lend(
                device, wanted, generation, lambda: self._is_free(device) and not generation.is_settled
            )
        except (EngineStartFailed, OSError) as error:
            _log.error("engine-start-failed", error=str(error))
            if isinstance(error, OSError) and error.errno in FULL:
                raise disk_full(f"no engine came up: {error.strerror}") from error
            raise Refusal("GENERATION", Fault.PLATFORM, f"no engine came up: {error}"[:1000]) from error

    def _write(self, generation: Generation, request: GenerationRequest, held: HeldBase, device: Device) -> None:
        """The request file and links of the adapter's files, which thereby cannot be deleted to make room."""
        adapter: Path | None = None
        generation.directory.mkdir(exist_ok=True)
        if request.adapter_files:
            adapter = generation.directory / "adapter"
            adapter.mkdir(exist_ok=True)
            for file in request.adapter_files:
                if file.path in _wanted(request.adapter_files):
                    _link(self._blobs.path(file.sha256), adapter / file.path)
        durable_json.write(
            generation.request_file,
            {
                "device": {"type": device.type, "index": device.index},
                "base_model": held.base_model.name,
                "model_directory": str(held.base_model.directory),
                "weights_digest": held.base_model.weights_digest,
                "cache_directory": str(self._files.cache),
                "model_type": held.family.id,
                "training_type": held.method.id,
                "quantization": vars(held.quantization),
                "adapter_directory": None if adapter is None else str(adapter),
                "lora": vars(resolve_lora(Hyperparameters(lora=request.lora), ())),
                "chat_template": request.chat_template,
                "messages": [{"role": message.role, "content": message.content} for message in request.messages],
                "sampling": request.sampling.to_json(),
            },
        )

    async def _clean_up(self, generation: Generation, placing: asyncio.Task[None]) -> None:
        await asyncio.gather(placing, return_exceptions=True)
        await generation.over.wait()
        await asyncio.to_thread(shutil.rmtree, generation.directory, ignore_errors=True)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def drain(self) -> None:
        """End every answer with NODE_DRAINING, whether its engine leaves or stays."""
        for generation in self._read:
            generation.fail(draining())

    async def until_placed(self) -> None:
        """Wait until nothing here starts an engine any more: who ends the engines must know them all."""
        await asyncio.gather(*self._placing, return_exceptions=True)

    async def close(self) -> None:
        """Drop what waits for engines; their directories go at the next start."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _spec_of(request: GenerationRequest) -> TrainingSpec:
    """Of a full training nothing but its base can be asked, and that is held as it is."""
    as_it_is = not request.training_type or request.training_type in ("full", "standard")
    return TrainingSpec(
        base_model=request.base_model,
        model_type=request.model_type,
        training_type=_AS_IT_IS if as_it_is else request.training_type,
        hyperparameters=Hyperparameters(quantization=request.quantization, lora=request.lora),
    )


def _wanted(files: Sequence[AdapterFile]) -> tuple[str, ...]:
    return CHECKPOINT_FILES if {file.path for file in files}.issuperset(CHECKPOINT_FILES) else ADAPTER_FILES


def _check_base(request: GenerationRequest, held: HeldBase) -> None:
    found = held.base_model
    if request.weights_digest and request.weights_digest != found.weights_digest:
        raise Refusal(
            "MODEL_NOT_FOUND",
            Fault.PLATFORM,
            f"{found.name} is here with other weights than were asked for",
            field="weights_digest",
            details={"weights_digest": found.weights_digest},
        )


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)
