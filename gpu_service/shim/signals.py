"""The shim's signals: they wake its loop, and a request to end is remembered. Refuses to do any work in a handler."""

from __future__ import annotations

import selectors
import signal
import socket
from types import FrameType


class Signals:
    """From its making on, signals wake the selector."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.termination_requested = False
        reading, writing = socket.socketpair()
        reading.setblocking(False)
        writing.setblocking(False)
        self._sockets = (reading, writing)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        # A handler of our own is needed for the wake-up; reaping is done on every turn of the loop.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_termination)
        selector.register(reading, selectors.EVENT_READ, lambda mask: reading.recv(4096))

    def _note_termination(self, _number: int, _frame: FrameType | None) -> None:
        # A handler may run in the middle of anything; the loop does the work on its next turn.
        self.termination_requested = True
