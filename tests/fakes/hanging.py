"""Ways in which an engine stops making progress and says nothing of it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path


def _sleep(directory: Path) -> None:
    # A signal wakes it.
    while True:
        ctypes.CDLL(None).sleep(100_000)


def _spin(directory: Path) -> None:
    # In C, with the interpreter's lock given up.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def _spin_locked(directory: Path) -> None:
    # In C, and no other thread of the process gets to run.
    re.match("(a+)+$", "a" * 100 + "b")


def _stop(directory: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _stalled_file(directory: Path) -> None:
    # A file system that does not answer: the pipe is opened for writing, and nobody ever reads.
    os.mkfifo(directory / "fifo")
    os.open(directory / "fifo", os.O_WRONLY)


WAYS: Mapping[str, Callable[[Path], None]] = {
    "sleep": _sleep,
    "spin": _spin,
    "spin-locked": _spin_locked,
    "stop": _stop,
    "stalled-file": _stalled_file,
}


def hang_up(way: str, directory: Path) -> None:
    """Never come back. `directory` may be written into."""
    WAYS[way](directory)
