"""Functions that wait for the store, and the groups in which threads run them. Runs none itself.

A group is begun by the event loop, which steps aside for a moment where it is one of writes: between two statements the
driver lets go of the interpreter, and a thread beside a busy loop waits long to have it back, again and again. The
moment is short, whatever the disk does: a thread that is not done by then goes on beside the loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from control_service.app.store_ports import Transaction


@dataclass(kw_only=True)
class Work:
    """One waiting function, and what became of it."""

    function: Callable[[Transaction], Any]
    answer: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class Group:
    """Works that are one thread's task."""

    def __init__(self, works: list[Work]) -> None:
        self.works = works

    def tell(self) -> None:
        """On the event loop: gives everybody the answer."""
        for work in self.works:
            if work.answer.done():  # the caller was cancelled; its work is committed all the same
                continue
            if work.error is not None:
                work.answer.set_exception(work.error)
            else:
                work.answer.set_result(work.result)


class WriteGroup(Group):
    """One that the event loop steps aside for."""

    def __init__(self, works: list[Work]) -> None:
        super().__init__(works)
        self._running = threading.Lock()
        self._running.acquire()

    def step_aside(self, seconds: float) -> None:
        """On the event loop: returns when the functions have run, or the time is over."""
        self._running.acquire(timeout=seconds)

    def have_run(self) -> None:
        """In the thread: the functions have run; what follows needs the interpreter little."""
        if self._running.locked():
            self._running.release()
