"""Which run has which device, and how much of its memory. Pure bookkeeping; measures and frees nothing.

One run per device at a time. An idle engine's base is evictable, so it counts as free here.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_service.domain.errors import Fault, Refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """A device's part that a run holds."""

    run_id: str
    device_id: str
    num_bytes: int


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

    def reserve(self, *, run_id: str, device_id: str, num_bytes: int, capacity_bytes: int) -> Reservation:
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
        reservation = Reservation(run_id=run_id, device_id=device_id, num_bytes=num_bytes)
        self._reservations[run_id] = reservation
        return reservation

    def release(self, run_id: str) -> Reservation | None:
        """Give back what the run holds, and tell what it was; None when it holds nothing."""
        return self._reservations.pop(run_id, None)

    def restore(self, reservation: Reservation) -> None:
        """Undo a release: its successor came to nothing, and the run still has the device."""
        self._reservations[reservation.run_id] = reservation


def _busy(message: str, device_id: str) -> Refusal:
    return Refusal("NODE_BUSY", Fault.PLATFORM, message, details={"device": device_id})
