"""Control groups of a test's own: one with little memory, and one whose processes stand still and cannot be killed.

Raises OSError where the machine does not let this process make them; whoever asked skips, and says so.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_REMOVE_AGAIN_SECONDS = 0.05
_REMOVE_WITHIN_SECONDS = 10.0


@contextmanager
def _group(parent: Path) -> Iterator[Path]:
    directory = parent / f"tunesmith-{uuid.uuid4().hex[:12]}"
    directory.mkdir()
    try:
        yield directory
    finally:
        deadline = time.monotonic() + _REMOVE_WITHIN_SECONDS
        while directory.is_dir() and time.monotonic() < deadline:
            # Busy while a process of it is on its way out.
            with contextlib.suppress(OSError):
                directory.rmdir()
            time.sleep(_REMOVE_AGAIN_SECONDS)


@contextmanager
def limited_memory(limit_bytes: int) -> Iterator[Path]:
    """The `cgroup.procs` of a group whose processes have so much memory together, whatever the version of groups is."""
    is_first = (_ROOT / "memory").is_dir()
    with _group(_ROOT / "memory" if is_first else _ROOT) as directory:
        (directory / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(str(limit_bytes))
        yield directory / "cgroup.procs"


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process stands still; what kills it takes effect behind this. Only the first version of groups has that."""
    with _group(_ROOT / "freezer") as directory:
        (directory / "cgroup.procs").write_text(str(pid))
        try:
            (directory / "freezer.state").write_text("FROZEN")
            yield
        finally:
            (directory / "freezer.state").write_text("THAWED")
