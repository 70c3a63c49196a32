"""Plans a spec on this node: CHECK in this process, EXACT in an exec'd planner, which may take long and is killed on
cancel.

Refuses to read datasets or tokenizers itself.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_service.devices import Device
from gpu_service.domain import plan
from gpu_service.domain.errors import Fault, Refusal
from gpu_service.domain.plan import CheckedPlan
from gpu_service.domain.spec import TrainingSpec
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.models import ModelShelf
from gpu_service.runs.node_files import NodeFiles
from gpu_service.runs.run_files import blob_not_found
from gpu_service.shim import durable_json

_PLANNER_COMMAND = (sys.executable, "-m", "gpu_service.planner")
_MAX_LINE_BYTES = 4 * 1024 * 1024
_EXIT_REFUSED = 3


class Planning:
    """Plans against this node's models, blobs and libraries."""

    def __init__(self, *, files: NodeFiles, models: ModelShelf, blobs: BlobStore, versions: Mapping[str, str]) -> None:
        self._files = files
        self._models = models
        self._blobs = blobs
        self._versions = versions
        # Tokenizing takes all the processor that it can get.
        self._one_at_a_time = asyncio.Semaphore(1)

    async def check(self, spec: Mapping[str, Any], device: Device, *, spec_digest: str = "") -> CheckedPlan:
        """The plan at level CHECK. Raises `Refusal`."""
        parsed = TrainingSpec.from_json(spec)
        model = await self._models.read(parsed.base_model)
        return await asyncio.to_thread(
            plan.resolve, parsed, model, _for_planning(device), self._versions, spec_digest=spec_digest
        )

    async def weights_digest(self, checked: CheckedPlan) -> str:
        """The digest of the plan's base. Raises `Refusal` MODEL_INVALID."""
        return await self._models.weights_digest(checked.base_model)

    async def check_blobs(self, spec: Mapping[str, Any]) -> None:
        """Raises `Refusal` BLOB_NOT_FOUND (details `sha256`) unless every dataset is here, and what it starts from."""
        missing = await self._blobs.find_missing(TrainingSpec.from_json(spec).contents)
        if missing:
            raise blob_not_found([digest for digest, _ in missing])

    async def exact(self, spec: Mapping[str, Any], device: Device) -> dict[str, Any]:
        """The plan at level EXACT, as proto JSON. Raises `Refusal`. Cancelling it kills the planner."""
        checked = await self.check(spec, device)
        request = {
            "spec": dict(spec),
            "model_directory": str(checked.base_model.directory),
            "blobs_directory": str(self._files.blobs),
            "cache_directory": str(self._files.cache),
            "device": asdict(_for_planning(device)),
            # As a run's engine has it, so that the run trains by this very plan.
            "weights_digest": await self.weights_digest(checked),
        }
        path = self._files.requests / f"{uuid.uuid4().hex}.json"
        async with self._one_at_a_time:
            # Until the plan is read nothing of it may be deleted to make room.
            await self.check_blobs(spec)
            try:
                await asyncio.to_thread(durable_json.write, path, request)
                plan_directory = await self._run_planner(path)
            finally:
                await asyncio.to_thread(path.unlink, missing_ok=True)
            content = await asyncio.to_thread(durable_json.read, plan_directory / "plan.json")
        if content is None:
            raise _planner_failed("the planner left no plan.json")
        return content

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """No planner of this server works during the block; calls for one wait."""
        async with self._one_at_a_time:
            yield

    async def _run_planner(self, request: Path) -> Path:
        process = await asyncio.create_subprocess_exec(
            *_PLANNER_COMMAND,
            str(request),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
        )
        try:
            output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        # Progress lines are for the engine's own run of the planner; the last line is the outcome.
        last = _last_message(output)
        if process.returncode == 0 and last.get("type") == "planned":
            return Path(last["plan_directory"])
        if process.returncode == _EXIT_REFUSED and last.get("type") == "refused":
            raise Refusal.from_failure(last["failure"])
        raise _planner_failed(
            f"the planner ended with status {process.returncode}: {errors.decode(errors='replace')[-2000:]}"
        )


def _last_message(output: bytes) -> dict[str, Any]:
    """Empty when there is none, or when the planner's death cut it short."""
    lines = output.splitlines()
    try:
        message = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _for_planning(device: Device) -> plan.Device:
    return plan.Device(
        type=device.type,
        name=device.name,
        total_memory_bytes=device.total_memory_bytes,
        free_memory_bytes=device.free_memory_bytes,
        compute_capability=device.compute_capability,
    )


def _planner_failed(message: str) -> Refusal:
    return Refusal("PLANNING", Fault.PLATFORM, message, stage="PLANNING")
