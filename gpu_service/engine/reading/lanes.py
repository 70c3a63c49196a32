"""A thread's own way onto a device: host buffers to read into, and the copies from there.

On CUDA two pinned buffers and a stream of its own: while one is copied, the other is filled. On a CPU one buffer, and
a copy that is done when it returns. A lane belongs to the thread that opened it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch


class Lane(Protocol):
    """What a reading thread needs of a device."""

    def next_buffer(self, num_bytes: int) -> torch.Tensor:
        """Host bytes [num_bytes] to fill; valid until the next but one is asked for."""
        ...

    def move(self, host: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What was filled, as numbers on the device; valid until the next `move`."""
        ...

    def put(self, host: torch.Tensor, dtype: torch.dtype, destination: torch.Tensor) -> None:
        """What was filled, as numbers, into `destination` [n] on the device, rounded to its type."""
        ...

    def scratch(self, num_floats: int) -> torch.Tensor:
        """float32 [num_floats] on the device, the same memory each time."""
        ...

    def finish(self) -> None:
        """Everything that was asked for is done."""
        ...


@dataclass(frozen=True, kw_only=True)
class LaneRoom:
    """Memory on the device that a lane works in: bytes of one piece, none on a CPU, and float32 for whoever takes it.

    It is made by one thread for all lanes, on the default stream, so that it is everyone's again afterwards: memory
    that a stream's own thread allocates stays with that stream.
    """

    device: torch.device
    piece_bytes: int
    staged: torch.Tensor
    scratch: torch.Tensor


def make_rooms(num_lanes: int, device: torch.device, *, piece_bytes: int, scratch_floats: int) -> list[LaneRoom]:
    """Room for so many lanes."""
    staged_bytes = piece_bytes if device.type == "cuda" else 0
    staged = torch.empty((num_lanes, staged_bytes), dtype=torch.uint8, device=device)
    scratch = torch.empty((num_lanes, scratch_floats), dtype=torch.float32, device=device)
    return [
        LaneRoom(device=device, piece_bytes=piece_bytes, staged=staged[lane], scratch=scratch[lane])
        for lane in range(num_lanes)
    ]


class CpuLane:
    """Nothing to overlap with."""

    def __init__(self, room: LaneRoom) -> None:
        self._host = torch.empty(room.piece_bytes, dtype=torch.uint8)
        self._scratch = room.scratch

    def next_buffer(self, num_bytes: int) -> torch.Tensor:
        return self._host[:num_bytes]

    def move(self, host: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return host.view(dtype)

    def put(self, host: torch.Tensor, dtype: torch.dtype, destination: torch.Tensor) -> None:
        destination.copy_(host.view(dtype))

    def scratch(self, num_floats: int) -> torch.Tensor:
        return self._scratch[:num_floats]

    def finish(self) -> None:
        """Copies were done when they returned."""


class CudaLane:
    """Everything goes through the current stream, which is this lane's own while it is open."""

    _NUM_BUFFERS = 2

    def __init__(self, room: LaneRoom) -> None:
        self._hosts = [
            torch.empty(room.piece_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(self._NUM_BUFFERS)
        ]
        self._copied = [torch.cuda.Event() for _ in range(self._NUM_BUFFERS)]
        self._staged = room.staged
        self._scratch = room.scratch
        self._turn = 0

    def next_buffer(self, num_bytes: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % self._NUM_BUFFERS
        # Done at once for a buffer that was never copied from.
        self._copied[self._turn].synchronize()
        return self._hosts[self._turn][:num_bytes]

    def move(self, host: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        staged = self._staged[: len(host)]
        staged.copy_(host, non_blocking=True)
        self._copied[self._turn].record()
        return staged.view(dtype)

    def put(self, host: torch.Tensor, dtype: torch.dtype, destination: torch.Tensor) -> None:
        if destination.dtype is dtype:
            destination.copy_(host.view(dtype), non_blocking=True)
            self._copied[self._turn].record()
        else:
            destination.copy_(self.move(host, dtype))

    def scratch(self, num_floats: int) -> torch.Tensor:
        return self._scratch[:num_floats]

    def finish(self) -> None:
        torch.cuda.current_stream().synchronize()


@contextmanager
def open_lane(room: LaneRoom) -> Iterator[Lane]:
    """A lane for the calling thread. Work that was queued on the default stream is done before the lane's own."""
    if room.device.type != "cuda":
        yield CpuLane(room)
        return
    torch.cuda.set_device(room.device)
    stream = torch.cuda.Stream(room.device)
    stream.wait_stream(torch.cuda.default_stream(room.device))
    with torch.cuda.stream(stream):
        lane = CudaLane(room)
        try:
            yield lane
        finally:
            # Before its buffers go, whatever ended the reading.
            lane.finish()
