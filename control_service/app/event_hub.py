"""Serves watchers of jobs from encoded pages that all watchers of a job share. Keeps no queue per watcher: each reads
by its own cursor, after commit, so a slow one holds up nobody. What a job's log gains is shown to all of its watchers
together, the more of them the more events at a time; `pacing` wakes them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from control_service.app.jobs import check_position
from control_service.app.lookups import job_of
from control_service.app.pacing import Pacer, PacerConfig, WaitingRoom
from control_service.app.ports import EventCodec
from control_service.app.store_ports import CommitNotice, Store, Transaction
from control_service.domain.errors import Unavailable
from control_service.domain.event import StoredEvent

# Behind the end of the log by less than this, a watcher is at its end.
_MANY_EVENTS = 32
# Of events that are not shown yet, so many are kept; where there are more, pages are read from the store.
_MAX_NEWEST = 4096
_MAX_NEWEST_BYTES = 8 * 1024**2
# What a page takes in memory besides its message: at the tail of a log a page is one small event.
_PAGE_OVERHEAD_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class EventHubConfig:
    """How pages are cut and kept."""

    heartbeat_seconds: float = 15.0
    max_page_events: int = 256
    max_page_bytes: int = 1024**2
    cache_bytes: int = 64 * 1024**2
    pace: PacerConfig = field(default_factory=PacerConfig)


@dataclass(frozen=True, kw_only=True)
class _Page:
    """Encoded events after a sequence, up to `last_sequence`."""

    last_sequence: int
    message: bytes
    # Cut before its end because the next event would have made it too large: it stays as it is, however the log grows.
    is_cut: bool = False

    @property
    def size_bytes(self) -> int:
        """About what it takes in memory."""
        return len(self.message) + _PAGE_OVERHEAD_BYTES


class _Feed(WaitingRoom):
    """What the hub knows of one watched job; those who have read all that was shown wait in it."""

    def __init__(self, on_show: Callable[[_Feed], None]) -> None:
        super().__init__()
        self._on_show = on_show
        # The newest event that is committed, and the newest that watchers are given. They differ for a moment, so that
        # all watchers are given the same pages.
        self.last_sequence = 0
        self.shown_sequence = 0
        # The newest events as they were committed, those that are not shown yet among them.
        self.newest: list[StoredEvent] = []
        self._newest_bytes = 0
        self.is_over = False
        # A commit may have ended the job; whoever comes to the end of the log looks, once for all.
        self.may_be_over = False
        self.looking: asyncio.Task[None] | None = None

    def show(self) -> None:
        """Gives everybody what there is."""
        try:
            self._on_show(self)
        finally:
            # Without pages of what is new, they are read from the store.
            self.shown_sequence = self.last_sequence
            self._forget_newest()

    def take(self, events: Sequence[StoredEvent], last_sequence: int) -> None:
        """What a commit brought."""
        self.last_sequence = max(self.last_sequence, last_sequence)
        if not self.newest or not events or self.newest[-1].sequence + 1 != events[0].sequence:
            self._forget_newest()
        self.newest += events
        self._newest_bytes += sum(len(event.payload) for event in events)
        if len(self.newest) > _MAX_NEWEST or self._newest_bytes > _MAX_NEWEST_BYTES:
            self._forget_newest()

    def _forget_newest(self) -> None:
        self.newest = []
        self._newest_bytes = 0


class EventHub:
    """Built once; `watch` may be called by any number of watchers."""

    def __init__(self, *, store: Store, codec: EventCodec, config: EventHubConfig) -> None:
        self._store = store
        self._codec = codec
        self._config = config
        self._feeds: dict[str, _Feed] = {}
        self._pages: OrderedDict[tuple[str, int], _Page] = OrderedDict()
        self._cached_bytes = 0
        self._reading: dict[tuple[str, int], asyncio.Task[_Page]] = {}
        self._pacer = Pacer(config=config.pace, heartbeat_seconds=config.heartbeat_seconds)
        self._draining = False
        self.num_pages_read = 0
        store.subscribe(self._on_commit)

    @property
    def num_watchers(self) -> int:
        """Watches that are open."""
        return self._pacer.num_watchers

    @property
    def num_cached_pages(self) -> int:
        """Pages that are kept."""
        return len(self._pages)

    async def watch(self, job_id: str, *, after_sequence: int = 0) -> AsyncIterator[bytes]:
        """Serialized WatchJobResponses: history, then the tail, heartbeats between.

        Ends after the last event of a job that is over. NotFound JOB_NOT_FOUND; OutOfRange HISTORY_COMPACTED with
        `oldest_sequence`, SEQUENCE_IN_FUTURE; Unavailable SHUTTING_DOWN once `drain` was called.
        """
        feed = self._feeds.setdefault(job_id, _Feed(partial(self._keep_newest, job_id)))
        self._pacer.enter(feed)
        try:
            await self._look(job_id, feed, after_sequence)
            position = after_sequence
            while True:
                self._refuse_if_draining()
                if position < feed.shown_sequence:
                    page = await self._page(job_id, position, feed.shown_sequence)
                    position = page.last_sequence
                    yield page.message
                    # More may have been shown while that was taken. Whoever is at its end waits for a turn all the
                    # same: a crowd that is slow would else never let go of the loop.
                    if feed.shown_sequence - _MANY_EVENTS < position < feed.shown_sequence:
                        await self._pacer.turn(feed)
                elif position >= feed.last_sequence and feed.is_over:
                    return
                elif position >= feed.last_sequence and (feed.may_be_over or feed.looking is not None):
                    await self._look_for_all(job_id, feed, position)
                # Nothing is awaited since the last look at the feed, so that no growth is missed.
                elif not await self._pacer.wait(feed):
                    yield self._codec.encode_heartbeat(position)
        finally:
            self._pacer.leave(feed)
            if feed.num_watchers == 0:
                self._feeds.pop(job_id, None)

    def drain(self) -> None:
        """Ends every watch with Unavailable SHUTTING_DOWN after what it has already been given."""
        self._draining = True
        self._pacer.wake_all(self._feeds.values())

    def _refuse_if_draining(self) -> None:
        if self._draining:
            raise Unavailable(
                "SHUTTING_DOWN", "the service is stopping; go on from the last sequence", retry_after_seconds=1.0
            )

    def _on_commit(self, notice: CommitNotice) -> None:
        # What the showing of one log meets keeps no other one from being shown.
        with ExitStack() as told:
            for job_id, last_sequence in notice.job_sequences.items():
                feed = self._feeds.get(job_id)
                if feed is None:
                    continue
                feed.take(notice.events.get(job_id, ()), last_sequence)
                feed.may_be_over |= notice.jobs_changed
                told.callback(self._pacer.tell, feed)

    async def _look_for_all(self, job_id: str, feed: _Feed, position: int) -> None:
        """One look for all who have come to the end of the log."""
        if feed.looking is None:
            feed.may_be_over = False
            feed.looking = asyncio.create_task(self._look_once(job_id, feed, position))
            # An error that nobody waits for any more is nobody's defect.
            feed.looking.add_done_callback(lambda task: task.cancelled() or task.exception())
        # One watcher that goes away must not take the look from the others.
        await asyncio.shield(feed.looking)

    async def _look_once(self, job_id: str, feed: _Feed, position: int) -> None:
        failed = True
        try:
            await self._look(job_id, feed, position)
            failed = False
        finally:
            # Here and not in a callback: who comes while the task is over but its callbacks wait would look for ever.
            feed.looking = None
            feed.may_be_over |= failed

    async def _look(self, job_id: str, feed: _Feed, position: int) -> None:
        def read(tx: Transaction) -> tuple[int, bool]:
            job = job_of(tx, job_id)
            return check_position(tx, job_id, position), job.is_over

        last_sequence, is_over = await self._store.read(read)
        # Several watchers look at once; an older look never takes back a newer one.
        if last_sequence >= feed.last_sequence:
            feed.last_sequence, feed.is_over = last_sequence, is_over
        # Where others watch already, a newcomer is given what they are given, and the rest with them.
        if feed.num_watchers == 1 or feed.shown_sequence < position:
            feed.show()
        elif feed.shown_sequence < feed.last_sequence:
            self._pacer.tell(feed)

    # Pages.

    async def _page(self, job_id: str, after_sequence: int, shown_sequence: int) -> _Page:
        key = (job_id, after_sequence)
        page = self._pages.get(key)
        # One that was read at the end of the log, which has grown since, would make many small ones of history.
        if page is not None and (
            page.is_cut
            or page.last_sequence >= min(after_sequence + _MANY_EVENTS, shown_sequence, self._end(key))
            or page.size_bytes > self._config.max_page_bytes // 2
        ):
            self._pages.move_to_end(key)
            return page
        reading = self._reading.get(key)
        if reading is None:
            reading = self._reading[key] = asyncio.create_task(self._read_page(key, shown_sequence))
            reading.add_done_callback(lambda _: self._reading.pop(key, None))
        # One watcher that goes away must not take the page from the others.
        return await asyncio.shield(reading)

    def _end(self, key: tuple[str, int]) -> int:
        """The last sequence that the page may have: at multiples of the page size, so that watchers who start anywhere
        soon share pages."""
        size = self._config.max_page_events
        return (key[1] // size + 1) * size

    async def _read_page(self, key: tuple[str, int], shown_sequence: int) -> _Page:
        job_id, after_sequence = key
        limit = min(self._end(key), shown_sequence) - after_sequence

        def read(tx: Transaction) -> _Page:
            found = tx.events.page(job_id, after_sequence=after_sequence, limit=limit)
            events = self._cut(found)
            if not events or events[0].sequence != after_sequence + 1:
                # Deleted or compacted while it was watched: said, never passed over.
                job_of(tx, job_id)
                check_position(tx, job_id, after_sequence)
                return _Page(last_sequence=after_sequence, message=self._codec.encode_heartbeat(after_sequence))
            return self._encoded(events, is_cut=len(events) < len(found))

        page = await self._store.read(read)
        self.num_pages_read += 1
        if page.last_sequence > after_sequence:
            self._keep(key, page)
        return page

    def _keep_newest(self, job_id: str, feed: _Feed) -> None:
        """Pages of what is about to be shown, from the events as they were committed."""
        start = feed.shown_sequence
        events = [event for event in feed.newest if event.sequence > start]
        if not events or events[0].sequence != start + 1 or events[-1].sequence != feed.last_sequence:
            return
        while events:
            many = events[: self._config.max_page_events]
            cut = self._cut(many)
            self._keep((job_id, cut[0].sequence - 1), self._encoded(cut, is_cut=len(cut) < len(many)))
            events = events[len(cut) :]

    def _encoded(self, events: Sequence[StoredEvent], *, is_cut: bool) -> _Page:
        return _Page(last_sequence=events[-1].sequence, message=self._codec.encode_page(events), is_cut=is_cut)

    def _cut(self, events: Sequence[StoredEvent]) -> Sequence[StoredEvent]:
        """As many as go into a page, one at least."""
        size_bytes = 0
        for count, event in enumerate(events):
            size_bytes += len(event.payload)
            if count and size_bytes > self._config.max_page_bytes:
                return events[:count]
        return events

    def _keep(self, key: tuple[str, int], page: _Page) -> None:
        earlier = self._pages.pop(key, None)
        self._cached_bytes += page.size_bytes - (earlier.size_bytes if earlier else 0)
        self._pages[key] = page
        while self._cached_bytes > self._config.cache_bytes:
            _, oldest = self._pages.popitem(last=False)
            self._cached_bytes -= oldest.size_bytes
