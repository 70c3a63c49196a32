"""Wakes watchers: all that wait for the same thing together, some in each turn of the event loop, a crowd at a pace
that leaves half of the loop's time to everybody else. Knows nothing of what they wait for, and keeps no timer of
theirs: one for the next to be woken, one for the next heartbeat."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

# Woken in one turn of the event loop. Between two turns a call that has just come is taken up.
_WOKEN_TOGETHER = 8
# What a crowd's turn took of the loop's time is left to others so many times before the next one.
_LEFT_TO_OTHERS = 1.0


@dataclass(frozen=True, kw_only=True)
class PacerConfig:
    """How often whom. What one watcher's message costs both ends decides: 50 to 100 microseconds."""

    # Between two showings of one log, for each of its watchers: what comes meanwhile is shown together. What comes
    # after a silence is shown at once.
    window_seconds_per_watcher: float = 0.0003
    max_window_seconds: float = 0.05
    # More watchers than that, all together, are a crowd; fewer are woken as fast as the loop turns.
    num_unpaced: int = 64
    # How many of a large crowd are woken; the smaller it is, the faster, up to at once.
    crowd_woken_per_second: float = 4000.0


class WaitingRoom(ABC):
    """Watchers of one thing."""

    def __init__(self) -> None:
        self.num_watchers = 0
        # Those who have all that was shown.
        self.waiting: dict[asyncio.Future[bool], None] = {}
        # Those whose turn comes, in their order.
        self.turns: deque[asyncio.Future[bool]] = deque()
        self.shown_seconds = -1e9
        # Something came that is not shown yet.
        self.has_more = False
        self.showing: asyncio.TimerHandle | None = None

    @abstractmethod
    def show(self) -> None:
        """What came is there for everybody from now on."""


class Pacer:
    """Built once; used on the event loop alone."""

    def __init__(self, *, config: PacerConfig, heartbeat_seconds: float) -> None:
        self._config = config
        self._heartbeat_seconds = heartbeat_seconds
        self._loop = asyncio.get_running_loop()
        self.num_watchers = 0
        # Rooms with turns; each in its turn, so that a crowd in one holds up no other.
        self._rooms: deque[WaitingRoom] = deque()
        self._waking: asyncio.Handle | None = None
        self._next_seconds = 0.0
        # When the heartbeat of everybody who waits is due, the earliest first since all wait equally long.
        self._due: dict[asyncio.Future[bool], float] = {}
        self._beating: asyncio.TimerHandle | None = None

    def enter(self, room: WaitingRoom) -> None:
        """Another watcher."""
        room.num_watchers += 1
        self.num_watchers += 1

    def leave(self, room: WaitingRoom) -> None:
        """One watcher less."""
        room.num_watchers -= 1
        self.num_watchers -= 1
        if room.num_watchers == 0 and room.showing is not None:
            room.showing.cancel()

    def tell(self, room: WaitingRoom) -> None:
        """Something came: shown at once after a silence, else with what else comes in the room's window."""
        room.has_more = True
        if room.showing is None and not room.turns:
            config = self._config
            window = min(room.num_watchers * config.window_seconds_per_watcher, config.max_window_seconds)
            pause = room.shown_seconds + window - self._loop.time()
            if pause <= 0:
                self._show(room)
            else:
                room.showing = self._loop.call_later(pause, self._show, room)

    async def wait(self, room: WaitingRoom) -> bool:
        """Until something is shown; False when a heartbeat is due first."""
        waiter: asyncio.Future[bool] = self._loop.create_future()
        room.waiting[waiter] = None
        self._due[waiter] = self._loop.time() + self._heartbeat_seconds
        if self._beating is None:
            self._beat_later()
        try:
            return await waiter
        finally:
            room.waiting.pop(waiter, None)
            self._due.pop(waiter, None)

    async def turn(self, room: WaitingRoom) -> None:
        """Until it is the caller's turn, like those who waited."""
        waiter: asyncio.Future[bool] = self._loop.create_future()
        self._add_turns(room, (waiter,))
        await waiter

    def wake_all(self, rooms: Iterable[WaitingRoom]) -> None:
        """Everybody, now."""
        for room in rooms:
            for waiter in (*room.waiting, *room.turns):
                if not waiter.done():
                    waiter.set_result(True)

    def _show(self, room: WaitingRoom) -> None:
        room.showing = None
        room.has_more = False
        room.shown_seconds = self._loop.time()
        try:
            room.show()
        finally:
            # Whatever that met: who waits is woken, and meets it for itself.
            waiting, room.waiting = room.waiting, {}
            self._add_turns(room, waiting)

    def _add_turns(self, room: WaitingRoom, waiters: Iterable[asyncio.Future[bool]]) -> None:
        had_turns = bool(room.turns)
        room.turns.extend(waiters)
        if room.turns and not had_turns:
            self._rooms.append(room)
            if self._waking is None:
                self._waking = self._loop.call_at(self._next_seconds, self._wake_some)

    def _wake_some(self) -> None:
        room = self._rooms.popleft()
        try:
            for _ in range(_WOKEN_TOGETHER):
                if not _wake_next(room.turns):
                    break
            if room.turns:
                self._rooms.append(room)
            elif room.has_more:
                self.tell(room)
        finally:
            # Behind those who have just been woken, which tells how long they took. What one room's showing met must
            # not keep all others waiting.
            self._waking = self._loop.call_soon(self._go_on, self._loop.time())

    def _go_on(self, started_seconds: float) -> None:
        self._next_seconds = now = self._loop.time()
        if self.num_watchers > self._config.num_unpaced:
            share = 1.0 - self._config.num_unpaced / self.num_watchers
            took = now - started_seconds
            pause = max(_WOKEN_TOGETHER / self._config.crowd_woken_per_second - took, _LEFT_TO_OTHERS * took)
            self._next_seconds += share * pause
        self._waking = self._loop.call_at(self._next_seconds, self._wake_some) if self._rooms else None

    # Heartbeats.

    def _beat_later(self) -> None:
        first = next(iter(self._due.values()), None)
        self._beating = None if first is None else self._loop.call_at(first, self._beat)

    def _beat(self) -> None:
        now = self._loop.time()
        for waiter, due_seconds in list(islice(self._due.items(), _WOKEN_TOGETHER)):
            if due_seconds > now:
                break
            del self._due[waiter]
            if not waiter.done():
                waiter.set_result(False)
        self._beat_later()


def _wake_next(turns: deque[asyncio.Future[bool]]) -> bool:
    """The next one that has not had a heartbeat, or left, meanwhile; False when there is none."""
    while turns:
        waiter = turns.popleft()
        if not waiter.done():
            waiter.set_result(True)
            return True
    return False
