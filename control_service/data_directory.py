"""The data directory as one process owns it: an exclusive lock, and the ready file that says who serves."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from control_service.adapters.blobs.directories import make_directories


class Taken(Exception):
    """Another process has what this one needs: the data directory or the port."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory's lock. Taken: another process has it. The kernel frees it however this process ends."""
    make_directories(directory)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise Taken(f"data directory {directory} is in use by another process (pid {holder})") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def forget_earlier(ready_file: Path | None) -> None:
    """Deletes what a process that was killed still announces; only the holder of the lock may."""
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)


@contextmanager
def announced(ready_file: Path | None, *, address: str) -> Iterator[None]:
    """Writes `{"address": ..., "pid": ...}` whole or not at all, and takes it away again."""
    if ready_file is None:
        yield
        return
    ready_file.parent.mkdir(parents=True, exist_ok=True)
    staged = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
    staged.write_text(json.dumps({"address": address, "pid": os.getpid()}))
    staged.replace(ready_file)
    try:
        yield
    finally:
        ready_file.unlink(missing_ok=True)
