"""Who is woken when: all together, in turns, and a crowd at a pace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from control_service.app.pacing import Pacer, PacerConfig, WaitingRoom

# Turns of the loop in which everything would have happened that can happen at once.
_TURNS = 500
_LONG_SECONDS = 3600.0


class _Room(WaitingRoom):
    """Counts what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.num_shown = 0

    def show(self) -> None:
        self.num_shown += 1


class _BadRoom(_Room):
    """Cannot show what came, so many times."""

    def __init__(self, num_bad: int, *, after: int = 0) -> None:
        super().__init__()
        self._bad = range(after, after + num_bad)

    def show(self) -> None:
        super().show()
        if self.num_shown - 1 in self._bad:
            raise ValueError("nothing to show")


class _Watchers:
    """So many of one room; each waits again once it was woken."""

    def __init__(self, pacer: Pacer, room: _Room, number: int) -> None:
        self._pacer = pacer
        self.room = room
        # How many were woken in all, by each turn of the loop that woke some.
        self.num_woken = 0
        self.heartbeats = 0
        self.tasks = [asyncio.create_task(self._watch()) for _ in range(number)]

    async def _watch(self) -> None:
        self._pacer.enter(self.room)
        try:
            while True:
                if await self._pacer.wait(self.room):
                    self.num_woken += 1
                else:
                    self.heartbeats += 1
        finally:
            self._pacer.leave(self.room)

    async def until_all_wait(self) -> None:
        await _turns(lambda: len(self.room.waiting) == len(self.tasks))

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def _turns(condition: Callable[[], bool] = lambda: False) -> int:
    """Lets the loop turn until the condition holds, or for long; how often."""
    for number in range(_TURNS):
        if condition():
            return number
        await asyncio.sleep(0)
    return _TURNS


def _pacer(*, heartbeat_seconds: float = _LONG_SECONDS, **config: float) -> Pacer:
    return Pacer(config=PacerConfig(**config), heartbeat_seconds=heartbeat_seconds)  # type: ignore[arg-type]


async def test_what_comes_after_a_silence_wakes_all_watchers_at_once() -> None:
    pacer = _pacer()
    watchers = _Watchers(pacer, _Room(), 64)
    await watchers.until_all_wait()
    pacer.tell(watchers.room)
    await _turns(lambda: watchers.num_woken == 64)
    assert (watchers.num_woken, watchers.room.num_shown) == (64, 1)
    await watchers.end()


async def test_a_crowd_is_not_woken_at_once() -> None:
    # At this pace the second turn of a large crowd would come in minutes.
    pacer = _pacer(crowd_woken_per_second=0.01)
    watchers = _Watchers(pacer, _Room(), 1000)
    await watchers.until_all_wait()
    pacer.tell(watchers.room)
    await _turns()
    assert 0 < watchers.num_woken < 100
    await watchers.end()


async def test_others_have_the_loop_between_the_turns_of_a_crowd() -> None:
    pacer = _pacer(crowd_woken_per_second=1e9, num_unpaced=64)
    watchers = _Watchers(pacer, _Room(), 1000)
    await watchers.until_all_wait()
    pacer.tell(watchers.room)
    most_between, seen = 0, 0
    for _ in range(100 * _TURNS):
        if watchers.num_woken == 1000:
            break
        await asyncio.sleep(0)
        most_between, seen = max(most_between, watchers.num_woken - seen), watchers.num_woken
    assert watchers.num_woken == 1000
    assert most_between <= 16
    await watchers.end()


async def test_a_crowd_in_one_room_does_not_hold_up_another_one() -> None:
    pacer = _pacer(crowd_woken_per_second=50.0)
    crowd, single = _Watchers(pacer, _Room(), 1000), _Watchers(pacer, _Room(), 1)
    await crowd.until_all_wait()
    await single.until_all_wait()
    pacer.tell(crowd.room)
    pacer.tell(single.room)
    async with asyncio.timeout(30):
        while not single.num_woken:  # noqa: ASYNC110 - a pacer tells nobody else
            await asyncio.sleep(0.01)
    # In the order of their coming it would have been the last of all.
    assert crowd.num_woken < 500
    await crowd.end()
    await single.end()


async def test_what_comes_within_the_window_is_shown_together_and_not_forgotten() -> None:
    pacer = _pacer(window_seconds_per_watcher=0.1, max_window_seconds=0.1)
    watchers = _Watchers(pacer, _Room(), 2)
    await watchers.until_all_wait()
    pacer.tell(watchers.room)
    await _turns(lambda: watchers.num_woken == 2)
    for _ in range(10):
        pacer.tell(watchers.room)
    async with asyncio.timeout(30):
        while watchers.num_woken < 4:  # noqa: ASYNC110 - a pacer tells nobody else
            await asyncio.sleep(0.01)
    assert (watchers.num_woken, watchers.room.num_shown) == (4, 2)
    await watchers.end()


async def test_what_comes_while_a_crowd_is_being_woken_is_shown_when_all_had_their_turn() -> None:
    pacer = _pacer(window_seconds_per_watcher=0.0)
    watchers = _Watchers(pacer, _Room(), 40)
    await watchers.until_all_wait()
    pacer.tell(watchers.room)
    pacer.tell(watchers.room)
    pacer.tell(watchers.room)
    await _turns()
    assert watchers.room.num_shown == 2
    # Those of the last turn were just being woken: a watcher looks for itself before it waits again.
    assert 72 <= watchers.num_woken <= 80
    await watchers.end()


async def test_who_waits_is_woken_although_nothing_can_be_shown() -> None:
    pacer = _pacer()
    watchers = _Watchers(pacer, _BadRoom(1), 20)
    await watchers.until_all_wait()
    with pytest.raises(ValueError, match="nothing to show"):
        pacer.tell(watchers.room)
    await _turns(lambda: watchers.num_woken == 20)
    assert watchers.num_woken == 20
    await watchers.end()


async def test_a_room_that_cannot_show_what_came_stops_nobody() -> None:
    pacer = _pacer(window_seconds_per_watcher=0.0)
    met: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: met.append(context["exception"]))
    watchers, others = _Watchers(pacer, _BadRoom(1, after=1), 20), _Watchers(pacer, _Room(), 20)
    await watchers.until_all_wait()
    await others.until_all_wait()
    # Shown for the second time by the one that wakes, when all had their turn.
    pacer.tell(watchers.room)
    pacer.tell(watchers.room)
    await _turns()
    assert [type(error) for error in met] == [ValueError]
    woken = watchers.num_woken
    for each in (watchers, others):
        pacer.tell(each.room)
    await _turns()
    assert (watchers.num_woken - woken, others.num_woken) == (20, 20)
    await watchers.end()
    await others.end()


async def test_heartbeats_come_to_those_who_wait_and_to_nobody_else() -> None:
    pacer = _pacer(heartbeat_seconds=0.05)
    watchers = _Watchers(pacer, _Room(), 20)
    async with asyncio.timeout(30):
        while watchers.heartbeats < 40:  # noqa: ASYNC110 - a pacer tells nobody else
            await asyncio.sleep(0.01)
    assert watchers.num_woken == 0
    await watchers.end()
    assert pacer.num_watchers == 0


async def test_who_leaves_while_it_waits_is_passed_over() -> None:
    pacer = _pacer(crowd_woken_per_second=0.01)
    watchers = _Watchers(pacer, _Room(), 1000)
    await watchers.until_all_wait()
    pacer.tell(watchers.room)
    await _turns()
    woken = watchers.num_woken
    await watchers.end()
    assert watchers.num_woken == woken
    assert pacer.num_watchers == 0
