"""Everything that must hold before an attempt is accepted: whose node it is, what is installed, the plan, the data, a
device.

Refuses with the reason; changes nothing but the memory ledger, and that last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpu_service.devices import Device, ListDevices
from gpu_service.doctor import Problem
from gpu_service.domain.errors import Fault, Refusal
from gpu_service.domain.memory import MemoryLedger, Reservation
from gpu_service.runs.planning import Planning


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """What was found out on the way."""

    device: Device
    model_directory: str
    weights_digest: str
    quantization: str
    # What a leaving run held of the device until now; given back to it when this one comes to nothing.
    displaced: Reservation | None


class Admission:
    """The node's side of "can this be trained here, now"."""

    def __init__(
        self,
        *,
        planning: Planning,
        ledger: MemoryLedger,
        list_devices: ListDevices,
        problems: Sequence[Problem],
        evictable_bytes: Callable[[str], int],
    ) -> None:
        """`evictable_bytes(device_id)` is what an idle engine keeps there."""
        self._planning = planning
        self._ledger = ledger
        self._list_devices = list_devices
        self._problems = problems
        self._evictable_bytes = evictable_bytes

    async def devices(self) -> list[Device]:
        """All devices; memory that an idle engine keeps counts as free."""
        found = await asyncio.to_thread(self._list_devices)
        return [
            replace(
                device,
                free_memory_bytes=min(
                    device.total_memory_bytes, device.free_memory_bytes + self._evictable_bytes(device.id)
                ),
            )
            for device in found
        ]

    def problem(self) -> Refusal | None:
        """Why the node trains nothing, if so."""
        if not self._problems:
            return None
        first = self._problems[0]
        return Refusal(
            "LIBRARY_KNOWN_BAD",
            Fault.PLATFORM,
            "; ".join(f"{problem.library} {problem.version}: {problem.reason}" for problem in self._problems),
            details={"library": first.library, "version": first.version, "install": first.install},
        )

    async def planning_device(self) -> Device:
        """The device that a plan is made for: a free one if there is one. Raises `Refusal` DEVICE_UNSUPPORTED."""
        usable = _usable(await self.devices())
        return next((device for device in usable if self._ledger.holder_of(device.id) is None), usable[0])

    async def admit(
        self,
        *,
        run_id: str,
        spec: Mapping[str, Any],
        spec_digest: str,
        weights_digest: str,
        leaving_run_ids: Sequence[str],
    ) -> Admitted:
        """Check all and reserve the device; runs that are leaving give theirs up. Raises `Refusal`."""
        problem = self.problem()
        if problem is not None:
            raise problem
        device = self._choose(_usable(await self.devices()), leaving_run_ids)
        checked = await self._planning.check(spec, device, spec_digest=spec_digest)
        found_digest = await self._planning.weights_digest(checked)
        if weights_digest and weights_digest != found_digest:
            raise Refusal(
                "MODEL_NOT_FOUND",
                Fault.PLATFORM,
                f"{checked.base_model.name} is here with other weights than the job is pinned to",
                field="weights_digest",
                details={"weights_digest": found_digest},
            )
        await self._planning.check_blobs(spec)
        # What a leaving run still holds is on its way out; only then does this one start.
        holder = self._ledger.holder_of(device.id)
        displaced = self._ledger.release(holder) if holder is not None else None
        capacity = device.total_memory_bytes if device.type == "cpu" or holder is not None else device.free_memory_bytes
        self._ledger.reserve(
            run_id=run_id, device_id=device.id, num_bytes=checked.memory.standing_bytes, capacity_bytes=capacity
        )
        return Admitted(
            device=device,
            model_directory=str(checked.base_model.directory),
            weights_digest=found_digest,
            quantization=checked.quantization.id,
            displaced=displaced,
        )

    def _choose(self, devices: Sequence[Device], leaving_run_ids: Sequence[str]) -> Device:
        for allowed in (None, *leaving_run_ids):
            for device in devices:
                if self._ledger.holder_of(device.id) == allowed:
                    return device
        raise Refusal("NODE_BUSY", Fault.PLATFORM, "every device of this node has a run")

    async def has_room(self) -> bool:
        """Whether a run could be placed now."""
        devices = await self.devices()
        return self.problem() is None and any(
            not device.quarantine_reason and self._ledger.holder_of(device.id) is None for device in devices
        )


def _usable(devices: Sequence[Device]) -> list[Device]:
    usable = [device for device in devices if not device.quarantine_reason]
    if not usable:
        raise Refusal(
            "DEVICE_UNSUPPORTED",
            Fault.HARDWARE,
            "no device of this node can be used",
            details={device.id: device.quarantine_reason for device in devices},
        )
    return usable
