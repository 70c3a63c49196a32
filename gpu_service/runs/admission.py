"""Everything that must hold before an attempt is accepted: whose node it is, what is installed, the plan, the data, a
device.

Refuses with the reason; changes nothing but the memory ledger, and that last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpu_service import host_memory
from gpu_service.devices import Device, ListDevices
from gpu_service.doctor import Problem
from gpu_service.domain.checked_plan import CheckedPlan
from gpu_service.domain.errors import Fault, Refusal
from gpu_service.domain.memory import MemoryLedger, Reservation, check_host_room
from gpu_service.runs.planning import Planning


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """What was found out on the way."""

    device: Device
    model_directory: str
    weights_digest: str
    quantization: str
    # Under what the node keeps its measurements of such runs, and what it has of them, for the planner.
    kind_of_run: str
    calibrations: Mapping[str, Any]
    # Its engine may find that it cannot be this one, and that the measurement is of no such run.
    trainer: str
    # Of the host's memory, at most.
    host_bytes: int
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
        quarantine_reason: Callable[[str], str] = lambda device_id: "",
        host_memory_bytes: Callable[[], int] = host_memory.total_bytes,
    ) -> None:
        """`evictable_bytes(device_id)` is what an idle engine keeps there; `quarantine_reason(device_id)` why a device
        that the driver answers for is not to be used; `host_memory_bytes()` what this machine's processes may have.
        """
        self._planning = planning
        self._ledger = ledger
        self._list_devices = list_devices
        self._problems = problems
        self._evictable_bytes = evictable_bytes
        self._quarantine_reason = quarantine_reason
        self._host_memory_bytes = host_memory_bytes

    async def devices(self) -> list[Device]:
        """All devices; memory that an idle engine keeps counts as free."""
        found = await asyncio.to_thread(self._list_devices)
        return [
            replace(
                device,
                free_memory_bytes=min(
                    device.total_memory_bytes, device.free_memory_bytes + self._evictable_bytes(device.id)
                ),
                quarantine_reason=device.quarantine_reason or self._quarantine_reason(device.id),
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
        """The device that a plan is made for: of the free ones, else of all, that with the most memory.

        Raises `Refusal` DEVICE_UNSUPPORTED.
        """
        usable = _usable(await self.devices())
        free = [device for device in usable if self._ledger.holder_of(device.id) is None]
        return max(free or usable, key=lambda device: device.total_memory_bytes)

    async def admit(
        self,
        *,
        run_id: str,
        spec: Mapping[str, Any],
        spec_digest: str,
        weights_digest: str,
        leaving_run_ids: Sequence[str],
        begun_by: str = "",
    ) -> Admitted:
        """Check all and reserve the device; runs that are leaving give theirs up. `begun_by` is what trained the
        checkpoint that the run goes on from, empty where it begins. Raises `Refusal`.
        """
        problem = self.problem()
        if problem is not None:
            raise problem
        device, checked = await self._place(spec, spec_digest, leaving_run_ids, begun_by)
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
        await self._planning.require_room(checked)
        host_memory_bytes = await asyncio.to_thread(self._host_memory_bytes)
        check_host_room(
            checked.memory.host_bytes,
            taken_bytes=self._ledger.host_bytes_beside({run_id, *leaving_run_ids}),
            total_bytes=host_memory_bytes,
            device_id=device.id,
        )
        # What a leaving run still holds is on its way out; only then does this one start.
        holder = self._ledger.holder_of(device.id)
        displaced = self._ledger.release(holder) if holder is not None else None
        self._ledger.reserve(
            run_id=run_id,
            device_id=device.id,
            num_bytes=checked.memory.standing_bytes,
            capacity_bytes=_capacity_bytes(device, is_held=holder is not None),
            host_bytes=checked.memory.host_bytes,
        )
        return Admitted(
            device=device,
            model_directory=str(checked.base_model.directory),
            weights_digest=found_digest,
            quantization=checked.quantization.id,
            kind_of_run=checked.kind_of_run,
            calibrations=self._planning.calibrations(checked),
            trainer=checked.hyperparameters.trainer,
            host_bytes=checked.memory.host_bytes,
            displaced=displaced,
        )

    async def _place(
        self, spec: Mapping[str, Any], spec_digest: str, leaving_run_ids: Sequence[str], begun_by: str
    ) -> tuple[Device, CheckedPlan]:
        """The device for the run by what it is estimated to need, with its plan there.

        First one that has all of it even if every example were as long as they may be, then one that has what is needed
        whatever their length. Raises `Refusal`: NODE_BUSY, or what the plan was refused with on every device.
        """
        fitting: list[tuple[Device, CheckedPlan]] = []
        too_small: Refusal | None = None
        for device in self._open_devices(_usable(await self.devices()), leaving_run_ids):
            try:
                checked = await self._planning.check(spec, device, spec_digest=spec_digest, begun_by=begun_by)
            except Refusal as refusal:
                if refusal.reason != "DOES_NOT_FIT":
                    raise
                too_small = refusal
                continue
            fitting.append((device, checked))
        if not fitting:
            raise too_small or Refusal("NODE_BUSY", Fault.PLATFORM, "every device of this node has a run")

        def room(place: tuple[Device, CheckedPlan]) -> tuple[int, int]:
            device, checked = place
            capacity = _capacity_bytes(device, is_held=self._ledger.holder_of(device.id) is not None)
            has_all = capacity >= checked.memory.total_bytes
            # Where examples of the greatest length would not fit, theirs may: the more memory the better.
            return has_all + (capacity >= checked.memory.standing_bytes), 0 if has_all else capacity

        # The first of the best.
        return max(fitting, key=room)

    def _open_devices(self, devices: Sequence[Device], leaving_run_ids: Sequence[str]) -> list[Device]:
        """Devices that no run has; where there is none, those of the runs that are leaving."""
        free = [device for device in devices if self._ledger.holder_of(device.id) is None]
        return free or [device for device in devices if self._ledger.holder_of(device.id) in leaving_run_ids]

    async def has_room(self) -> bool:
        """Whether a run could be placed now."""
        devices = await self.devices()
        return self.problem() is None and any(
            not device.quarantine_reason and self._ledger.holder_of(device.id) is None for device in devices
        )


def _capacity_bytes(device: Device, *, is_held: bool) -> int:
    """What a run can have of a device: of one that a run is about to leave, and of a CPU, everything."""
    return device.total_memory_bytes if device.type == "cpu" or is_held else device.free_memory_bytes


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
