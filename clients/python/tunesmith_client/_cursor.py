"""What a watch knows between two streams: the position, and when to stop trying. Pure; opens no stream.

Position moves when an event is given to the user, so a stream that is opened again starts at exactly the next one.
"""

import random
import time
from collections.abc import Callable, Iterator

import grpc

from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith_client._config import ClientConfig
from tunesmith_client._errors import ResourceExhausted, ServiceDefect, TunesmithError, Unavailable
from tunesmith_client._retry import lost_if_cancelled, pause_after, pauses


class Cursor:
    """Gives out each event once and in order, and decides after a broken stream whether and when to open the next."""

    def __init__(
        self,
        *,
        job_id: str,
        after_sequence: int,
        config: ClientConfig,
        random_source: random.Random | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job_id = job_id
        self.position = after_sequence
        self._config = config
        self._random = random_source or random.Random()
        self._monotonic = monotonic
        self._failing_since: float | None = None
        self._was_heard = False
        self._pauses = pauses(config.retry, self._random)

    def request(self) -> job_service_pb2.WatchJobRequest:
        """The request that goes on after the last event that was given out."""
        return job_service_pb2.WatchJobRequest(job_id=self.job_id, after_sequence=self.position)

    def take(self, response: job_service_pb2.WatchJobResponse) -> Iterator[event_pb2.Event]:
        """The events of a response that are new. Raises ServiceDefect on a gap: one lost event is worse than an end."""
        self._failing_since = None
        self._was_heard = True
        for event in response.events:
            if event.sequence <= self.position:
                continue
            if event.sequence != self.position + 1:
                raise ServiceDefect(
                    f"the log of job {self.job_id} jumped from {self.position} to {event.sequence}",
                    reason="SEQUENCE_GAP",
                )
            self.position = event.sequence
            yield event

    def pause_before_reopening(self, error: TunesmithError) -> float:
        """Seconds to wait before the next stream. Raises `error` when another stream cannot help or time is up."""
        lost = lost_if_cancelled(error)
        # Too many watches, one of which may be this one's own, on a link that the service has not yet found broken.
        if isinstance(error, ResourceExhausted) and self._was_heard and error.retry_after_seconds is not None:
            lost = Unavailable(
                error.message, reason=error.reason, code=error.code, retry_after_seconds=error.retry_after_seconds
            )
        now = self._monotonic()
        if self._failing_since is None:
            self._failing_since = now
            self._pauses = pauses(self._config.retry, self._random)
        pause_seconds = pause_after(lost, next(self._pauses))
        if pause_seconds is None or now - self._failing_since > self._config.watch_give_up_seconds:
            raise lost
        return pause_seconds

    def silence(self) -> Unavailable:
        """The error for a stream that said nothing, not even a heartbeat."""
        return Unavailable(
            f"the watch of job {self.job_id} was silent for {self._config.silence_limit_seconds:g} s",
            code=grpc.StatusCode.UNAVAILABLE,
        )
