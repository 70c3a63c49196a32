"""Serves watchers of jobs from encoded pages that all watchers of a job share. Keeps no queue per watcher."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from control_service.app.ports import Clock, EventCodec
from control_service.app.store_ports import Store


@dataclass(frozen=True, kw_only=True)
class EventHubConfig:
    """How pages are cut and kept."""

    heartbeat_seconds: float = 15.0
    max_page_events: int = 256
    cache_bytes: int = 64 * 1024**2


class EventHub:
    """Built once; `watch` may be called by any number of watchers."""

    def __init__(self, *, store: Store, codec: EventCodec, clock: Clock, config: EventHubConfig) -> None:
        self._store = store

    def watch(self, job_id: str, *, after_sequence: int = 0) -> AsyncIterator[bytes]:
        """Serialized WatchJobResponses: history, then the tail, heartbeats between.

        Ends after the last event of a job that is over. NotFound JOB_NOT_FOUND; OutOfRange HISTORY_COMPACTED with
        `oldest_sequence`, SEQUENCE_IN_FUTURE; Unavailable SHUTTING_DOWN once `drain` was called.
        """
        raise NotImplementedError

    def drain(self) -> None:
        """Ends every watch with Unavailable SHUTTING_DOWN after what it has already been given."""
