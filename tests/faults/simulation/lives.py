"""Control's lives, one after the other on one disk: begins each, clears away what is left of it, and asks the one that
there is. Decides nothing about when one ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from control_service.domain.errors import TunesmithError
from tests.fakes.control_codec import PickleCodec
from tests.faults.simulation.life import Disk, Life
from tests.faults.simulation.link import Weather
from tests.faults.simulation.node import SimNode

_PAUSES_SECONDS = (0.1, 1.0, 5.0, 40.0)


class Lives:
    """`before_start` is called each time before control begins again."""

    def __init__(
        self,
        *,
        disk: Disk,
        nodes: list[SimNode],
        weather: dict[str, Weather],
        codec: PickleCodec,
        before_start: Callable[[], None],
    ) -> None:
        self._disk = disk
        self._nodes = nodes
        self._weather = weather
        self._codec = codec
        self._before_start = before_start
        # The simulation's own tasks, which belong to no life.
        self._own: set[asyncio.Task[Any]] = set()
        self._life: Life | None = None
        self.num_ended = 0

    def own(self, task: asyncio.Task[Any]) -> None:
        """It does not end with a life."""
        self._own.add(task)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that does not end with a life."""
        task = asyncio.ensure_future(work)
        self.own(task)
        task.add_done_callback(self._own.discard)
        return task

    async def keep(self) -> None:
        """Control, again and again."""
        while True:
            life = self._life = Life(self._disk, self._nodes, self._weather, self._codec)
            starting = asyncio.create_task(
                life.runtime.start(configured_nodes=[(node.name, node.name) for node in self._nodes])
            )
            died = self.spawn(life.died.wait())
            await asyncio.wait({starting, died}, return_when=asyncio.FIRST_COMPLETED)
            if not life.died.is_set() and isinstance(starting.exception(), TunesmithError):
                self._disk.trace(f"control does not start: {starting.exception()}")
                life.die()
            await died
            self.num_ended += 1
            self._disk.trace("control is dead")
            await self._clear(starting)
            await asyncio.sleep(self._disk.dice.choice(_PAUSES_SECONDS))
            self._before_start()
            self._disk.trace("control starts")

    async def _clear(self, starting: asyncio.Task[Any]) -> None:
        engines = {run.task for node in self._nodes for run in node.history}
        left = asyncio.all_tasks() - self._own - engines - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.wait({starting, *left})

    async def ask(self, call: Callable[[Life], Coroutine[Any, Any, Any]]) -> Any:
        """The answer; None when control refused, or died of it or before."""
        life = self._life
        if life is None or not life.alive:
            return None
        asked = asyncio.create_task(call(life))
        died = self.spawn(life.died.wait())
        await asyncio.wait({asked, died}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if not asked.done():
            return None
        try:
            return asked.result()
        except (TunesmithError, asyncio.CancelledError):
            return None
