"""Keeps named asyncio tasks: starts each once, logs the one that fails, ends all. Restarts nothing by itself."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from control_service.app.back_off import BackOff, BackOffConfig
from control_service.app.ports import Clock
from control_service.domain.errors import TunesmithError

_log = structlog.get_logger(__name__)
T = TypeVar("T")


class TaskSet:
    """Tasks by name."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def names(self) -> list[str]:
        """Names of the tasks that run."""
        return list(self._tasks)

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Starts a task unless one of this name runs."""
        if name in self._tasks:
            return
        # One context for the task and the line of log about its end: what it bound is on that line, too.
        context = contextvars.copy_context()
        task = asyncio.create_task(work(), name=name, context=context)
        self._tasks[name] = task
        task.add_done_callback(lambda done: self._ended(name, done), context=context)

    def keep(
        self, name: str, work: Callable[[], Coroutine[Any, Any, None]], *, clock: Clock, back_off: BackOffConfig
    ) -> None:
        """Starts a task whose work begins again, after a pause, when it ends with a TunesmithError."""

        async def again_and_again() -> None:
            pauses = BackOff(back_off)
            while True:
                try:
                    await work()
                except TunesmithError as error:
                    _log.warning("task-begins-again", task=name, reason=error.reason, message=error.message)
                    await clock.sleep(pauses.next_seconds())
                else:
                    return

        self.start(name, again_and_again)

    async def stop(self, name: str) -> None:
        """Cancels a task and waits for its end."""
        task = self._tasks.get(name)
        if task is not None:
            await end(task)

    async def stop_all(self) -> None:
        """Cancels every task and waits for their ends."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, name: str, task: asyncio.Task[Any]) -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("task-failed", task=name, exc_info=error)


async def end(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits until it is over, whatever it ended with."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def undisturbed(work: Coroutine[Any, Any, T]) -> T:
    """Does work to its end even when the caller is cancelled, who hears of the cancellation only then."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
