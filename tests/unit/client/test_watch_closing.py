"""A watch that is closed while it opens a stream: nobody waits for a stream that nobody ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from tunesmith.control.v1 import job_service_pb2
from tunesmith_client import CallCancelled, ClientConfig
from tunesmith_client._caller import Caller
from tunesmith_client._cursor import Cursor
from tunesmith_client._watch import Watch


class _Stream:
    """Brings nothing until it is cancelled."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def __next__(self) -> job_service_pb2.WatchJobResponse:
        assert self._cancelled.wait(20), "nobody ends the stream"
        raise grpc.RpcError

    def cancel(self) -> None:
        self._cancelled.set()


def _watch(open_stream: Callable[[job_service_pb2.WatchJobRequest], Any]) -> Watch:
    config = ClientConfig()
    return Watch(open_stream, Cursor(job_id="j", after_sequence=0, config=config), config.silence_limit_seconds)


def _by_another_thread(watch: Watch) -> None:
    closer = threading.Thread(target=watch.close)
    closer.start()
    # It is through at once, or it waits for the stream that is being opened.
    closer.join(0.2)


def _by_a_signal(watch: Watch) -> None:
    watch.close()


@pytest.mark.parametrize("close", [_by_another_thread, _by_a_signal])
def test_a_stream_that_is_just_being_opened_is_ended_too(close: Callable[[Watch], None]) -> None:
    opened = []

    def open_stream(request: job_service_pb2.WatchJobRequest) -> Any:
        opened.append(request)
        close(watch)
        return _Stream()

    watch = _watch(open_stream)
    assert list(watch) == []
    assert len(opened) == 1


def test_one_that_was_closed_before_opens_no_stream() -> None:
    opened: list[object] = []
    watch = _watch(opened.append)
    watch.close()
    assert list(watch) == []
    assert opened == []


def test_a_watch_is_either_ended_with_its_client_or_refused() -> None:
    caller = Caller(ClientConfig())
    before = _watch(lambda _: _Stream())
    caller.keep(before)
    caller.close()
    assert list(before) == []
    with pytest.raises(CallCancelled, match="closed"):
        caller.keep(_watch(lambda _: _Stream()))
