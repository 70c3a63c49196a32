"""The stop switch of the run in hand: set by the control thread or a signal, read by the training thread.

A stop is honored at step boundaries, between batches of an evaluation, between loading stages and between phases. A
child process that the training thread waits for is killed at once. The switch never interrupts a step.

Whoever passes a boundary has made progress, and says so here: that is what a hang is told by.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

from gpu_service.engine.pace import SLOWEST_BYTES_PER_SECOND


class StopMode(Enum):
    """How a run is to end: without a trace, or at a checkpoint."""

    CANCEL = "cancel"
    CHECKPOINT = "checkpoint"


class StopRequested(Exception):
    """Raised at a boundary once a stop was asked for."""

    def __init__(self, mode: StopMode) -> None:
        super().__init__(mode.value)
        self.mode = mode


class StopSwitch:
    """One per run. `request` may be called from any thread and from a signal handler; it takes no lock."""

    def __init__(
        self,
        on_progress: Callable[[], None] = lambda: None,
        on_pause: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """`on_progress` is called by the training thread, often; `on_pause` before it falls silent for a while."""
        self._on_progress = on_progress
        self._on_pause = on_pause
        self._mode: StopMode | None = None
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def mode(self) -> StopMode | None:
        return self._mode

    def request(self, mode: StopMode) -> None:
        """Ask for a stop. CANCEL outranks CHECKPOINT, whichever came first."""
        if self._mode is not StopMode.CANCEL:
            self._mode = mode
        child = self._child
        if child is not None:
            _kill_group(child)

    def note_progress(self) -> None:
        """Something was done, in the midst of what cannot be stopped. Not to be called because time went by."""
        self._on_progress()

    def announce_bytes(self, num_bytes: int) -> None:
        """So many bytes go to or come from a disk in one piece, without a sign of progress before its end."""
        self._on_pause(num_bytes / SLOWEST_BYTES_PER_SECOND)

    def check(self) -> None:
        """Raise StopRequested when a stop was asked for; also a sign of progress."""
        self._on_progress()
        if self._mode is not None:
            raise StopRequested(self._mode)

    @contextmanager
    def owning(self, child: subprocess.Popen[bytes]) -> Iterator[None]:
        """While inside, a stop kills `child` (a leader of its own process group); on leaving, it is dead and reaped."""
        self._child = child
        try:
            # A stop that came between the child's start and the line above was not able to see the child.
            if self._mode is not None:
                _kill_group(child)
            yield
        finally:
            self._child = None
            if child.poll() is None:
                _kill_group(child)
            child.wait()


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
