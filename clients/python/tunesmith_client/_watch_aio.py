"""An asyncio watch of a job: each event once, in order, over as many streams as it takes. Never skips or repeats.

The same rules as the blocking watch. Cancelling the task that iterates cancels the stream; closing the client ends it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import grpc

from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith_client._caller_aio import count_cancellations, is_cancelled
from tunesmith_client._cursor import Cursor
from tunesmith_client._errors import TunesmithError, client_closed, error_from_aio

if TYPE_CHECKING:
    AsyncStream = grpc.aio.UnaryStreamCall[job_service_pb2.WatchJobRequest, job_service_pb2.WatchJobResponse]


async def watch(
    open_stream: "Callable[[job_service_pb2.WatchJobRequest], AsyncStream]",
    cursor: Cursor,
    *,
    limit_seconds: float,
    is_closed: Callable[[], bool],
) -> AsyncIterator[event_pb2.Event]:
    """Yields a job's events until its last one. CallCancelled when the client is closed already."""
    if is_closed():
        raise client_closed()
    while True:
        stream = open_stream(cursor.request())
        error: TunesmithError
        try:
            while True:
                # What ends the count itself is a cancellation, however many the last one counted.
                num_before = 0
                num_before = await count_cancellations()
                # Only the wait for the server counts as silence, not the time that the user takes with an event.
                response = await asyncio.wait_for(stream.read(), limit_seconds)
                if not isinstance(response, job_service_pb2.WatchJobResponse):  # grpc.aio.EOF
                    return
                for event in cursor.take(response):
                    yield event
        except asyncio.CancelledError:
            # A channel that is closed tells its readers what a task hears that was cancelled.
            if is_closed() and not is_cancelled(num_before):
                return
            raise
        except TimeoutError:
            error = cursor.silence()
        except grpc.aio.AioRpcError as cause:
            error = error_from_aio(cause)
        finally:
            stream.cancel()
        await asyncio.sleep(cursor.pause_before_reopening(error))
        if is_closed():
            return
