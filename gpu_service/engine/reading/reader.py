"""Moves pieces of files to where they belong, by several threads, and compares each with its digest where one is known.

A task is a row of pieces that one thread moves in order; tasks are taken up in the order that they lie on the disk.
Reading, hashing and copying leave the interpreter's lock to others. Refuses nothing itself: a file that ends early is
an OSError, a piece of another digest is noted, and the first failure of any thread ends all.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gpu_service.engine.reading.lanes import Lane, LaneRoom, make_rooms, open_lane

# A whole number of blocks of weights in every type. Digests are kept by piece: another size makes them all anew.
PIECE_BYTES = 8 * 1024 * 1024
# More copy no faster, and take the interpreter from whoever makes the model.
MAX_THREADS = 8
_WAIT_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Bytes of a file. `digest` is the SHA-256 that they must have, None where it is not known."""

    file: Path
    offset: int
    num_bytes: int
    digest: bytes | None = None


class Task(Protocol):
    """Pieces that belong together."""

    @property
    def pieces(self) -> Sequence[Piece]: ...

    @property
    def scratch_floats(self) -> int:
        """What it wants of a lane's scratch."""
        ...

    def take(self, number: int, host: torch.Tensor, lane: Lane) -> None:
        """Piece `number` lies in `host`, uint8 [num_bytes]; it is overwritten when the next one is read."""
        ...

    def finish(self, lane: Lane) -> None:
        """The last piece was taken."""
        ...


@dataclass(frozen=True, kw_only=True)
class PlainTask:
    """A run of one tensor, copied to its place `destination` [n] and rounded to its type."""

    pieces: Sequence[Piece]
    dtype: torch.dtype
    destination: torch.Tensor
    scratch_floats: int = 0

    def take(self, number: int, host: torch.Tensor, lane: Lane) -> None:
        first = number * PIECE_BYTES // self.dtype.itemsize
        count = self.pieces[number].num_bytes // self.dtype.itemsize
        lane.put(host, self.dtype, self.destination[first : first + count])

    def finish(self, lane: Lane) -> None:
        """Nothing follows."""


@dataclass(frozen=True, kw_only=True)
class HashTask:
    """Bytes that belong nowhere, such as headers: read for their digest alone."""

    pieces: Sequence[Piece]
    scratch_floats: int = 0

    def take(self, number: int, host: torch.Tensor, lane: Lane) -> None:
        """Nothing is kept."""

    def finish(self, lane: Lane) -> None:
        """Nothing follows."""


def cut(file: Path, offset: int, num_bytes: int, digests: Mapping[int, bytes]) -> list[Piece]:
    """A run of bytes in pieces; `digests` by the offset in the file that a piece begins at."""
    return [
        Piece(
            file=file, offset=first, num_bytes=min(PIECE_BYTES, offset + num_bytes - first), digest=digests.get(first)
        )
        for first in range(offset, offset + num_bytes, PIECE_BYTES)
    ]


class Reading:
    """Threads at work on tasks, from `start` to `wait`. Closing it early ends them."""

    def __init__(self, tasks: Sequence[Task], device: torch.device, *, hashes: bool, num_threads: int = 0) -> None:
        """`hashes`: every piece is hashed, also where no digest is known yet."""
        self._tasks = tasks
        self._device = device
        self._hashes = hashes
        self.total_bytes = sum(piece.num_bytes for task in tasks for piece in task.pieces)
        self.num_threads = min(num_threads or min(MAX_THREADS, len(os.sched_getaffinity(0))), max(len(tasks), 1))
        # SHA-256 by file and offset, of every piece that was hashed; and those that had another than was known.
        self.digests: dict[Path, dict[int, bytes]] = {}
        self.differing: list[Piece] = []
        self._queue: Iterator[Task] = iter(tasks)
        self._done_bytes = 0
        self._failure: BaseException | None = None
        self.failed_file: Path | None = None
        self._ends = False
        self._changed = threading.Condition()
        self._num_running = 0
        self._threads: list[threading.Thread] = []
        self._descriptors: dict[Path, int] = {}

    def start(self) -> None:
        """Open the files and begin. Raises OSError."""
        for file in {piece.file for task in self._tasks for piece in task.pieces}:
            self.failed_file = file
            self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            self.digests[file] = {}
        self.failed_file = None
        scratch_floats = max((task.scratch_floats for task in self._tasks), default=0)
        rooms = make_rooms(self.num_threads, self._device, piece_bytes=PIECE_BYTES, scratch_floats=scratch_floats)
        for number, room in enumerate(rooms):
            thread = threading.Thread(target=self._work, args=(room,), name=f"weights-{number}", daemon=True)
            self._threads.append(thread)
        self._num_running = len(self._threads)
        for thread in self._threads:
            thread.start()

    def wait(self, progress: Callable[[int], None]) -> None:
        """Until everything is in its place; `progress` hears of bytes done, and may raise to end it.

        Raises what a thread raised first. Call `close` whatever happens.
        """
        while True:
            with self._changed:
                if self._num_running:
                    self._changed.wait(_WAIT_SECONDS)
                done_bytes, num_running = self._done_bytes, self._num_running
            if not num_running:
                break
            progress(done_bytes)
        if self._failure is not None:
            raise self._failure
        progress(self._done_bytes)

    def close(self) -> None:
        """End the threads and close the files."""
        self._ends = True
        for thread in self._threads:
            # One that could not be started cannot be waited for.
            if thread.ident is not None:
                thread.join()
        self._threads = []
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def _work(self, room: LaneRoom) -> None:
        try:
            with open_lane(room) as lane:
                while (task := self._next()) is not None:
                    for number, piece in enumerate(task.pieces):
                        if self._ends:
                            return
                        self._move(task, number, piece, lane)
                    task.finish(lane)
        except BaseException as error:  # noqa: BLE001 - a thread's outermost boundary: raised again where it is waited for
            with self._changed:
                self._failure = self._failure or error
                self._ends = True
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    def _next(self) -> Task | None:
        with self._changed:
            return None if self._ends else next(self._queue, None)

    def _move(self, task: Task, number: int, piece: Piece, lane: Lane) -> None:
        host = lane.next_buffer(piece.num_bytes)
        view = memoryview(host.numpy())  # type: ignore[arg-type]
        self._read(piece, view)
        if self._hashes or piece.digest is not None:
            digest = hashlib.sha256(view).digest()
            self.digests[piece.file][piece.offset] = digest
            if piece.digest is not None and digest != piece.digest:
                self.differing.append(piece)
        task.take(number, host, lane)
        with self._changed:
            self._done_bytes += piece.num_bytes

    def _read(self, piece: Piece, view: memoryview) -> None:
        descriptor, done = self._descriptors[piece.file], 0
        while done < piece.num_bytes:
            try:
                count = os.preadv(descriptor, [view[done:]], piece.offset + done)
            except OSError:
                self.failed_file = piece.file
                raise
            if count == 0:
                self.failed_file = piece.file
                raise OSError(f"{piece.file.name} ends at byte {piece.offset + done}, before its last tensor does")
            done += count
