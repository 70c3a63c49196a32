"""How much memory of the machine this process may have: all of it, or what its memory cgroups leave.

A cgroup's limit holds for everything below it, so the lowest on the way up counts. Reads files of the kernel's and
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def total_bytes(*, root: Path = _ROOT, own: Path = _OWN) -> int:
    """The machine's memory, or a limit that is lower."""
    limits = [limit for limit, _ in _limits(root, own)]
    return min([int(psutil.virtual_memory().total), *limits])


def available_bytes(*, root: Path = _ROOT, own: Path = _OWN) -> int:
    """What can be had now without anything being swapped or killed."""
    left = [max(limit - used, 0) for limit, used in _limits(root, own)]
    return min([int(psutil.virtual_memory().available), *left])


def _limits(root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each cgroup that has a limit; pages of files that can be dropped are no use."""
    for directory, names in _directories(root, own):
        limit, used = (_number(directory / name) for name in names)
        if limit is not None and used is not None:
            yield limit, used - min(_inactive_file_bytes(directory / "memory.stat"), used)


def _directories(root: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str]]]:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        directory = top / path.lstrip("/")
        while True:
            yield directory, names
            if directory == top:
                break
            directory = directory.parent


def _number(path: Path) -> int | None:
    """None for a file that is not there, and for `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _inactive_file_bytes(path: Path) -> int:
    try:
        fields = dict(line.split(" ", 1) for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file") or fields.get("inactive_file") or 0)
