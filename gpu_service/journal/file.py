"""The file format: records with a checksum, one writer, any number of readers.

A record is u32 length of the event bytes, u32 CRC-32 over sequence and event bytes, u64 sequence, event bytes (a
serialized `EncodedEvent`), all little-endian. The checksum is zlib's, because the shim has nothing but the standard
library. This module refuses to change anything but the tail, and refuses a second writer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from google.protobuf.timestamp_pb2 import Timestamp

from gpu_service.journal.events import kind_of
from gpu_service.journal.failpoints import failpoint
from tunesmith.common.v1 import event_pb2

_HEADER = struct.Struct("<IIQ")
_SEQUENCE = struct.Struct("<Q")
MAX_EVENT_BYTES = 256 * 1024
# Kept allocated behind the end of the file, so that a full disk never keeps a run from saying how it ended.
RESERVE_BYTES = 256 * 1024
# Read at a time.
_BLOCK_BYTES = 64 * 1024
_RESERVE_STRIDE_BYTES = 1024 * 1024
_SYNC_INTERVAL_SECONDS = 0.2
_FALLOC_FL_KEEP_SIZE = 1

# Fsynced before append returns. Everything else is in the page cache at once (it survives the death of any process) and
# on the disk within _SYNC_INTERVAL_SECONDS.
DURABLE_KINDS = frozenset(
    {
        event_pb2.EVENT_KIND_RUN_STATE,
        event_pb2.EVENT_KIND_PHASE,
        event_pb2.EVENT_KIND_PLAN,
        event_pb2.EVENT_KIND_CHECKPOINT,
        event_pb2.EVENT_KIND_RESUMED,
        event_pb2.EVENT_KIND_ARTIFACT,
        event_pb2.EVENT_KIND_MEMORY_RELEASED,
        event_pb2.EVENT_KIND_REALIZED,
    }
)
# May be written into the reserve.
_CLOSING_KINDS = frozenset({event_pb2.EVENT_KIND_RUN_STATE, event_pb2.EVENT_KIND_MEMORY_RELEASED})
# Code of the one warning that may too: a stop that found no room for a checkpoint must be able to say so.
STEPS_LOST = "steps-lost"


class JournalLocked(Exception):
    """Another process writes this journal."""


class JournalDamaged(Exception):
    """A record in the middle of the journal is not readable; what follows it cannot be trusted."""


class JournalFull(Exception):
    """The disk has no room for another event; the reserve for closing events is still there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One event of a run: its run sequence, and the serialized `EncodedEvent` (whose own `sequence` is 0)."""

    run_sequence: int
    event: bytes

    def decode(self) -> event_pb2.EncodedEvent:
        return event_pb2.EncodedEvent.FromString(self.event)


def _checksum(sequence: int, event: bytes) -> int:
    return zlib.crc32(event, zlib.crc32(_SEQUENCE.pack(sequence)))


def _records(descriptor: int, offset: int, expected_sequence: int) -> Iterator[tuple[Record, int]]:
    """Whole records from `offset`, each with the offset behind it; ends at the first that is not whole. Reads many
    records at a time: what is written meanwhile may be seen by the next call only."""
    block, start = b"", 0
    while True:
        if len(block) - start < _HEADER.size:
            block, start = os.pread(descriptor, _BLOCK_BYTES, offset), 0
            if len(block) < _HEADER.size:
                return
        length, checksum, sequence = _HEADER.unpack_from(block, start)
        if sequence != expected_sequence or not 0 < length <= MAX_EVENT_BYTES:
            return
        size = _HEADER.size + length
        if len(block) - start < size:
            block, start = os.pread(descriptor, max(size, _BLOCK_BYTES), offset), 0
            if len(block) < size:
                return
        event = block[start + _HEADER.size : start + size]
        if _checksum(sequence, event) != checksum:
            return
        start += size
        offset += size
        expected_sequence += 1
        yield Record(run_sequence=sequence, event=event), offset


def _reserve(descriptor: int, end: int, size: int) -> bool:
    """Allocate blocks behind the end without changing the file's size. False when the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.fallocate(descriptor, _FALLOC_FL_KEEP_SIZE, ctypes.c_long(end), ctypes.c_long(size)) != 0:
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise OSError(code, os.strerror(code))
    return True


class Writer:
    """The one writer of a journal. Safe to call from several threads; appends are in call order.

    Opening cuts a torn tail: only the run's engine or shim may open a Writer.
    """

    def __init__(self, path: Path, *, attempt: int) -> None:
        """Open or create. Raises JournalLocked when another process holds it, OSError."""
        self._attempt = attempt
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise JournalLocked(f"{path} is being written by another process") from None
        self._last = 0
        self._end = 0
        for record, end in _records(self._descriptor, 0, 1):
            self._last, self._end = record.run_sequence, end
        self._can_reserve = True
        self._cut_tail()
        os.fsync(self._descriptor)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._reserved_end = self._end
        self._dirty = False
        self._closed = threading.Event()
        self._syncer = threading.Thread(target=self._sync_periodically, name="journal-sync", daemon=True)
        self._syncer.start()

    @classmethod
    def open(cls, path: Path, attempt: int) -> Writer:
        """Same as the constructor."""
        return cls(path, attempt=attempt)

    @property
    def last_sequence(self) -> int:
        """Run sequence of the newest record; 0 when there is none."""
        return self._last

    def append(self, payload: event_pb2.EventPayload) -> int:
        """Write one event and return its run sequence. Durable kinds are on the disk when this returns.

        Raises ValueError for an empty or over-long (256 KiB) payload, JournalFull, OSError.
        """
        kind = kind_of(payload)
        now = Timestamp()
        now.FromNanoseconds(time.time_ns())
        with self._lock:
            sequence = self._last + 1
            event = event_pb2.EncodedEvent(
                attempt=self._attempt,
                run_sequence=sequence,
                kind=kind,
                time=now,
                payload=payload.SerializeToString(),
            ).SerializeToString()
            if len(event) > MAX_EVENT_BYTES:
                raise ValueError(f"an event of {len(event)} bytes is over the limit of {MAX_EVENT_BYTES}")
            record = _HEADER.pack(len(event), _checksum(sequence, event), sequence) + event
            if kind not in _CLOSING_KINDS and payload.warning.code != STEPS_LOST:
                self._keep_reserve(len(record))
            failpoint("journal.before-append")
            self._write(record)
            self._last = sequence
            self._end += len(record)
            if kind in DURABLE_KINDS:
                failpoint("journal.before-fsync")
                os.fsync(self._descriptor)
                self._dirty = False
            else:
                self._dirty = True
        failpoint("journal.after-append")
        return sequence

    def _keep_reserve(self, length: int) -> None:
        needed = self._end + length + RESERVE_BYTES
        if not self._can_reserve or needed <= self._reserved_end:
            return
        target = needed + _RESERVE_STRIDE_BYTES
        try:
            self._can_reserve = _reserve(self._descriptor, self._end, target - self._end)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise JournalFull("no space is left for events") from error
        self._reserved_end = target

    def _cut_tail(self) -> None:
        """Drop a torn record behind the end, and nothing else."""
        if os.fstat(self._descriptor).st_size == self._end:
            # Cutting would give back the reserve, with which an engine that died on a full disk is to be closed.
            return
        os.ftruncate(self._descriptor, self._end)
        # That took the reserve along. Without room for it the closing events have to find their own.
        with contextlib.suppress(OSError):
            self._can_reserve = self._can_reserve and _reserve(self._descriptor, self._end, RESERVE_BYTES)

    def _write(self, record: bytes) -> None:
        written = 0
        try:
            while written < len(record):
                written += os.pwrite(self._descriptor, record[written:], self._end + written)
        except OSError as error:
            # What was written of it is a torn tail; the next append starts at the same place.
            self._cut_tail()
            self._reserved_end = self._end
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise JournalFull("no space is left for events") from error
            raise

    def _sync_periodically(self) -> None:
        while not self._closed.wait(_SYNC_INTERVAL_SECONDS):
            with self._lock:
                dirty, self._dirty = self._dirty, False
            # Outside the lock: the training thread must never wait for a disk.
            if dirty and not self._closed.is_set():
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Sync and close; later appends fail."""
        self._closed.set()
        self._syncer.join()
        with self._lock:
            if self._descriptor >= 0:
                os.fsync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Reader:
    """Reads a journal while it is being written. Never changes it; not safe for several threads at once."""

    def __init__(self, path: Path) -> None:
        """Open. Raises FileNotFoundError, OSError."""
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._sequence = 0
        self._offset = 0

    def read(self, after: int, limit: int = 256, limit_bytes: int = 1024 * 1024) -> list[Record]:
        """Records with a run sequence above `after`, oldest first: at most `limit`, and about `limit_bytes`.

        An empty list means that no whole record is there yet. Reading on from where the last call ended costs nothing;
        an `after` before that reads from the start. Raises JournalDamaged when the file is shorter than what was read.
        """
        if after < self._sequence:
            self._sequence, self._offset = 0, 0
        found: list[Record] = []
        size = 0
        for record, end in _records(self._descriptor, self._offset, self._sequence + 1):
            self._sequence, self._offset = record.run_sequence, end
            if record.run_sequence <= after:
                continue
            found.append(record)
            size += len(record.event)
            if len(found) >= limit or size >= limit_bytes:
                break
        if os.fstat(self._descriptor).st_size < self._offset:
            raise JournalDamaged(f"{self._path} is shorter than what was read from it")
        return found

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
