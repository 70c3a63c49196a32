"""Which run has which device, how much of its memory, and of the host's. Pure bookkeeping; measures and frees nothing.

One run per device at a time. An idle engine's base is evictable, so it counts as free here. The host's memory is one
for all devices: what runs lock of it adds up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from gpu_service.domain.errors import Fault, Refusal
from gpu_service.domain.recomputation import HOST_SPARE_BYTES

# After which whoever found too little of the host's memory may ask again.
_HOST_RETRY_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """A device's part that a run holds; `host_bytes` of the host's memory, at most until its exact plan is known."""

    run_id: str
    device_id: str
    num_bytes: int
    host_bytes: int = 0


class MemoryLedger:
    """Reservations by run."""

    def __init__(self) -> None:
        self._reservations: dict[str, Reservation] = {}

    def holder_of(self, device_id: str) -> str | None:
        """The run that has the device, if any."""
        for reservation in self._reservations.values():
            if reservation.device_id == device_id:
                return reservation.run_id
        return None

    def holds(self, run_id: str) -> bool:
        """Whether the run has a device."""
        return run_id in self._reservations

    def host_bytes_beside(self, run_ids: Collection[str] = ()) -> int:
        """Memory of the host that runs other than these hold, or may come to hold."""
        return sum(one.host_bytes for one in self._reservations.values() if one.run_id not in run_ids)

    def note_host_bytes(self, run_id: str, host_bytes: int) -> None:
        """The exact plan of a run says what it holds of the host's memory; nothing for a run that holds no device."""
        known = self._reservations.get(run_id)
        if known is not None:
            self._reservations[run_id] = replace(known, host_bytes=host_bytes)

    def reserve(
        self, *, run_id: str, device_id: str, num_bytes: int, capacity_bytes: int, host_bytes: int = 0
    ) -> Reservation:
        """Give the device to the run. `capacity_bytes` is what the device has when nothing of ours is on it.

        The same run again changes nothing. Raises `Refusal` NODE_BUSY.
        """
        known = self._reservations.get(run_id)
        if known is not None:
            return known
        holder = self.holder_of(device_id)
        if holder is not None:
            raise _busy(f"device {device_id} is taken by run {holder}", device_id)
        if num_bytes > capacity_bytes:
            raise _busy(
                f"the run needs {num_bytes} bytes on {device_id}, where {capacity_bytes} can be had now", device_id
            )
        reservation = Reservation(run_id=run_id, device_id=device_id, num_bytes=num_bytes, host_bytes=host_bytes)
        self._reservations[run_id] = reservation
        return reservation

    def release(self, run_id: str) -> Reservation | None:
        """Give back what the run holds, and tell what it was; None when it holds nothing."""
        return self._reservations.pop(run_id, None)

    def restore(self, reservation: Reservation) -> None:
        """Undo a release: its successor came to nothing, and the run still has the device."""
        self._reservations[reservation.run_id] = reservation


def check_host_room(host_bytes: int, *, taken_bytes: int, total_bytes: int, device_id: str) -> None:
    """Raises `Refusal` NODE_BUSY (details `retry_after_seconds`) where other runs hold the host's memory that a run
    needs; `total_bytes` 0 is unknown.

    Alone it may need more than there is: its exact plan says whether it does, and is refused then.
    """
    if is_host_short(host_bytes, taken_bytes=taken_bytes, total_bytes=total_bytes):
        raise _busy(
            f"up to {host_bytes:,} bytes of the host's memory are to be locked for the run, of {total_bytes:,} that "
            f"other runs hold {taken_bytes:,} of",
            device_id,
            # Until one of them is over, which may take hours; a device that is free meanwhile is for others to take.
            retry_after_seconds=f"{_HOST_RETRY_SECONDS:g}",
        )


def is_host_short(host_bytes: int, *, taken_bytes: int, total_bytes: int) -> bool:
    """Whether what other runs hold is what keeps a run from the host's memory that it needs."""
    return bool(host_bytes and taken_bytes and total_bytes) and (
        host_bytes + taken_bytes + HOST_SPARE_BYTES > total_bytes
    )


def _busy(message: str, device_id: str, **details: str) -> Refusal:
    return Refusal("NODE_BUSY", Fault.PLATFORM, message, details={"device": device_id, **details})
