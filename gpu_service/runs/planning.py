"""Plans a spec on this node: CHECK in this process, EXACT in an exec'd planner, which may take long and is killed on
cancel.

Refuses to read datasets or tokenizers itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpu_service import host_memory, torch_build
from gpu_service.devices import Device
from gpu_service.domain import plan
from gpu_service.domain.checked_plan import HeldBase
from gpu_service.domain.memory import is_host_short
from gpu_service.domain.plan import CheckedPlan
from gpu_service.domain.plan_base import resolve_base
from gpu_service.domain.spec import TrainingSpec
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.memory_records import MemoryRecords
from gpu_service.runs.models import ModelShelf
from gpu_service.runs.node_files import NodeFiles
from gpu_service.runs.planner_process import PlannerProcess, planner_failed
from gpu_service.runs.room import require_room, room_warnings
from gpu_service.runs.run_files import blob_not_found
from gpu_service.shim import durable_json


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """An exact plan as proto JSON, the directories that an engine needs for it, and its kind for measurements."""

    plan: dict[str, Any]
    plan_directory: str
    kind_of_run: str
    model_directory: str
    blobs_directory: str
    cache_directory: str


class Planning:
    """Plans against this node's models, blobs and libraries."""

    def __init__(
        self,
        *,
        files: NodeFiles,
        models: ModelShelf,
        blobs: BlobStore,
        planner: PlannerProcess,
        versions: Mapping[str, str],
        memory: MemoryRecords,
        taken_host_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """`memory` is what the node measured, by which plans are calibrated; `taken_host_bytes()` what its runs hold of
        the host's.
        """
        self._files = files
        self._models = models
        self._blobs = blobs
        self._versions = versions
        self._planner = planner
        self._memory = memory
        self._taken_host_bytes = taken_host_bytes

    async def check(
        self, spec: Mapping[str, Any], device: Device, *, spec_digest: str = "", begun_by: str = ""
    ) -> CheckedPlan:
        """The plan at level CHECK. Raises `Refusal`."""
        parsed = TrainingSpec.from_json(spec)
        model = await self._models.read(parsed.base_model)
        planned_for = await asyncio.to_thread(_for_planning, device)
        return await asyncio.to_thread(
            plan.resolve,
            parsed,
            model,
            planned_for,
            self._versions,
            spec_digest=spec_digest,
            calibrations=self._memory.all(),
            begun_by=begun_by,
        )

    async def hold_base(self, spec: TrainingSpec, device: Device) -> HeldBase:
        """How the spec's base is held on the device; its weights digest is known. Raises `Refusal`."""
        model = await self._models.read(spec.base_model)
        held = resolve_base(spec, model, await asyncio.to_thread(_for_planning, device), self._versions)
        digest = await self._models.weights_digest(model)
        return replace(held, base_model=replace(model, weights_digest=digest))

    def calibrations(self, checked: CheckedPlan) -> dict[str, list[list[int]]]:
        """What the node measured of runs like this one, as a planner is told."""
        return self._memory.of_kind(checked.kind_of_run)

    async def weights_digest(self, checked: CheckedPlan) -> str:
        """The digest of the plan's base. Raises `Refusal` MODEL_INVALID."""
        return await self._models.weights_digest(checked.base_model)

    async def check_blobs(self, spec: Mapping[str, Any]) -> None:
        """Raises `Refusal` BLOB_NOT_FOUND (details `sha256`) unless every dataset is here, and what it starts from."""
        missing = await self._blobs.find_missing(TrainingSpec.from_json(spec).contents)
        if missing:
            raise blob_not_found([digest for digest, _ in missing])

    async def require_room(self, checked: CheckedPlan) -> None:
        """Raises `Refusal` DISK_FULL unless a checkpoint and the artifacts of the run fit this node's disk."""
        await asyncio.to_thread(require_room, self._files.runs, checked)

    async def checked(self, spec: Mapping[str, Any], device: Device) -> dict[str, Any]:
        """The plan at level CHECK, as proto JSON, with what this node's disk and its other runs have to say.

        Raises `Refusal`.
        """
        return await self._with_room(await self.check(spec, device))

    async def _with_room(self, checked: CheckedPlan, plan_json: Mapping[str, Any] | None = None) -> dict[str, Any]:
        told = dict(checked.to_json() if plan_json is None else plan_json)
        warnings = await asyncio.to_thread(room_warnings, self._files.runs, checked)
        total_bytes = await asyncio.to_thread(host_memory.total_bytes)
        # Here and in no thread: runs come and go on this loop while a thread would add up what they hold.
        held = _host_warnings(
            int(told["memory"]["host_bytes"]), taken_bytes=self._taken_host_bytes(), total_bytes=total_bytes
        )
        return {**told, "warnings": [*told.get("warnings", []), *warnings, *held]}

    async def exact(self, spec: Mapping[str, Any], device: Device) -> dict[str, Any]:
        """The plan at level EXACT, as proto JSON. Raises `Refusal`. Cancelling it kills the planner."""
        async with self.planned(spec, device) as planned:
            return await self._with_room(await self.check(spec, device), planned.plan)

    @asynccontextmanager
    async def planned(self, spec: Mapping[str, Any], device: Device) -> AsyncIterator[PlannedRun]:
        """The same with where everything of it lies, and stays during the block: the node plans nothing else, and
        deletes nothing to make room.
        """
        checked = await self.check(spec, device)
        request: dict[str, Any] = {
            "spec": dict(spec),
            "model_directory": str(checked.base_model.directory),
            "blobs_directory": str(self._files.blobs),
            "cache_directory": str(self._files.cache),
            "device": asdict(await asyncio.to_thread(_for_planning, device)),
            # As a run's engine has it, so that the run trains by this very plan.
            "weights_digest": await self.weights_digest(checked),
            "calibrations": self.calibrations(checked),
        }
        async with self._planner.turn():
            await self.check_blobs(spec)
            answer = await self._planner.ask(request, answer="planned")
            content = await asyncio.to_thread(durable_json.read, Path(answer["plan_directory"]) / "plan.json")
            if content is None:
                raise planner_failed("the planner left no plan.json")
            yield PlannedRun(
                plan=content,
                plan_directory=str(answer["plan_directory"]),
                kind_of_run=checked.kind_of_run,
                model_directory=request["model_directory"],
                blobs_directory=request["blobs_directory"],
                cache_directory=request["cache_directory"],
            )

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """No planner of this server works during the block; calls for one wait."""
        async with self._planner.at_rest():
            yield


def _host_warnings(host_bytes: int, *, taken_bytes: int, total_bytes: int) -> list[str]:
    """What a plan says of memory of the host that other runs have."""
    if not is_host_short(host_bytes, taken_bytes=taken_bytes, total_bytes=total_bytes):
        return []
    return [
        f"inputs of recomputed layers wait in {host_bytes:,} bytes of the host's memory, of which runs of this "
        f"node hold {taken_bytes:,} now: this one waits until they are over"
    ]


def _for_planning(device: Device) -> plan.Device:
    """Reads files of the kernel's, and looks for one of torch's."""
    return plan.Device(
        type=device.type,
        name=device.name,
        total_memory_bytes=device.total_memory_bytes,
        free_memory_bytes=device.free_memory_bytes,
        compute_capability=device.compute_capability,
        host_memory_bytes=host_memory.total_bytes(),
        has_cuda_build=device.type == "cpu" and torch_build.has_cuda(),
    )
