"""A blocking watch of a job: each event once, in order, over as many streams as it takes. Never skips or repeats.

A stream is opened again after UNAVAILABLE, a lost connection, or silence longer than 2.5 heartbeats. It ends with the
job's last event; HISTORY_COMPACTED and every other refusal is raised.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

import grpc

from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith_client._cursor import Cursor
from tunesmith_client._errors import error_from_sync

if TYPE_CHECKING:
    # The library's types alone have this name.
    from grpc import _CallIterator

    Stream = _CallIterator[job_service_pb2.WatchJobResponse]


class SilenceAlarm:
    """Calls `ring` when an armed wait lasts longer than the limit; one sleeping thread for the life of a watch."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._condition = threading.Condition()
        self._deadline: float | None = None
        self._ring: Callable[[], object] | None = None
        self._stopped = False
        self.rang = False
        threading.Thread(target=self._run, name="tunesmith-watch-silence", daemon=True).start()

    def arm(self, ring: Callable[[], object]) -> None:
        """Starts a wait; `ring` is called from the alarm's thread if it is not disarmed in time."""
        # No notify: the thread sleeps at most one limit, so it wakes before this deadline anyway.
        with self._condition:
            self.rang, self._ring, self._deadline = False, ring, time.monotonic() + self._limit_seconds

    def disarm(self) -> None:
        """Ends the wait."""
        with self._condition:
            self._deadline = None

    def stop(self) -> None:
        """Ends the thread."""
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def _run(self) -> None:
        with self._condition:
            while not self._stopped:
                remaining = self._limit_seconds
                if self._deadline is not None:
                    remaining = self._deadline - time.monotonic()
                if remaining > 0:
                    self._condition.wait(remaining)
                elif self._ring is not None:
                    self._deadline, self.rang = None, True
                    self._ring()


class Watch(Iterator[event_pb2.Event]):
    """Iterates a job's events. `position` is the sequence given out last; `close` ends it from any thread."""

    def __init__(
        self, open_stream: "Callable[[job_service_pb2.WatchJobRequest], Stream]", cursor: Cursor, limit: float
    ):
        self._open_stream = open_stream
        self._cursor = cursor
        self._limit_seconds = limit
        self._closed = threading.Event()
        # Held while a stream is opened, so that whoever closes finds it, or it is not opened any more. Taken again by
        # a thread that a signal makes close what it is just opening.
        self._opening = threading.RLock()
        self._stream: Stream | None = None
        self._events = self._run()

    @property
    def position(self) -> int:
        """Sequence of the last event that was given out."""
        return self._cursor.position

    def __next__(self) -> event_pb2.Event:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the watch; a blocked `next` returns with StopIteration."""
        with self._opening:
            self._closed.set()
            stream = self._stream
        if stream is not None:
            stream.cancel()

    def _open(self) -> "Stream | None":
        with self._opening:
            if self._closed.is_set():
                return None
            self._stream = self._open_stream(self._cursor.request())
            if self._closed.is_set():
                self._stream.cancel()
                return None
            return self._stream

    def _run(self) -> Iterator[event_pb2.Event]:
        alarm = SilenceAlarm(self._limit_seconds)
        try:
            while (stream := self._open()) is not None:
                try:
                    yield from self._read(stream, alarm)
                    return
                except grpc.RpcError as error:
                    if self._closed.is_set():
                        return
                    reason = self._cursor.silence() if alarm.rang else error_from_sync(error)
                    pause_seconds = self._cursor.pause_before_reopening(reason)
                finally:
                    stream.cancel()
                self._closed.wait(pause_seconds)
        finally:
            alarm.stop()

    def _read(self, stream: "Stream", alarm: SilenceAlarm) -> Iterator[event_pb2.Event]:
        while True:
            # Only the wait for the server counts as silence, not the time that the user takes with an event.
            alarm.arm(stream.cancel)
            try:
                response = next(stream, None)
            finally:
                alarm.disarm()
            if response is None:
                return
            yield from self._cursor.take(response)
