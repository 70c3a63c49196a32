"""Finds, measures, kills and reaps processes through /proc. Refuses to signal a process that it cannot tell apart.

As a child subreaper the shim inherits whatever its descendants leave behind, whatever session they moved to. Killing
direct children again and again until none is left therefore ends all of them, and never hits a reused process id: a
child's id is free only once it was reaped here.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessFacts:
    """One line of /proc/<pid>/stat, as far as it is needed."""

    # `R`, `S`, `T`, `D`, `Z` and what else the kernel has.
    state: str
    parent_pid: int
    session: int
    # Clock ticks since boot; with the process id it names a process once and for all.
    start_time: int


def become_subreaper() -> None:
    """Inherit the orphans of all descendants. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def facts(pid: int) -> ProcessFacts | None:
    """What the kernel says of a process; None when there is none."""
    try:
        content = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command stands in parentheses and may hold anything, parentheses too.
    fields = content[content.rindex(")") + 2 :].split()
    return ProcessFacts(state=fields[0], parent_pid=int(fields[1]), session=int(fields[3]), start_time=int(fields[19]))


def pids() -> list[int]:
    """All process ids of this PID namespace."""
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def children(parent_pid: int) -> list[int]:
    """Direct children, zombies too."""
    found = ((pid, facts(pid)) for pid in pids())
    return [pid for pid, process in found if process is not None and process.parent_pid == parent_pid]


def tree(root_pid: int) -> list[int]:
    """The process and all its descendants."""
    children_of: dict[int, list[int]] = {}
    for pid in pids():
        process = facts(pid)
        if process is not None:
            children_of.setdefault(process.parent_pid, []).append(pid)
    found = [root_pid]
    for pid in found:
        found.extend(children_of.get(pid, []))
    return found


def resident_bytes(members: Iterable[int]) -> int:
    """Sum of the resident set sizes; processes that are gone count as 0."""
    total = 0
    for pid in members:
        try:
            total += int((_PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE_BYTES
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def kill_children() -> None:
    """SIGKILL to every direct child of this process; stopped ones die of it too."""
    for pid in children(os.getpid()):
        # Reaped only by this thread, so the id is still the child's.
        os.kill(pid, signal.SIGKILL)


def kill_descendants_but(spared_pid: int) -> int:
    """SIGKILL to every descendant of this process but that child; gives how many were there and alive.

    A dead one that only waits for its parent to be reaped holds nothing, and does not count.
    """
    count = 0
    for pid in tree(os.getpid())[1:]:
        seen = facts(pid)
        if pid == spared_pid or seen is None or seen.state == "Z":
            continue
        count += 1
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            # Looked at again: the descriptor is bound to whoever has the id now.
            again = facts(pid)
            if again is not None and again.start_time == seen.start_time:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            os.close(descriptor)
    return count


def reap() -> tuple[list[tuple[int, int]], bool]:
    """Reap all children that have ended: (pid, wait status) each, and whether any child is left."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, True
        ended.append((pid, status))


def with_environment(name: str, value: str) -> list[int]:
    """Processes whose environment was started with `name=value`, but for this one."""
    wanted = f"{name}={value}".encode()
    found: list[int] = []
    for pid in pids():
        if pid != os.getpid() and _has_environment(pid, wanted):
            found.append(pid)
    return found


def kill_with_environment(name: str, value: str) -> list[int]:
    """SIGKILL to every process started with `name=value` but this one; gives those that were there."""
    wanted = f"{name}={value}".encode()
    killed: list[int] = []
    for pid in with_environment(name, value):
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            # Looked at again: the descriptor is bound to whoever has the id now.
            if _has_environment(pid, wanted):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                killed.append(pid)
        except ProcessLookupError:
            continue
        finally:
            os.close(descriptor)
    return killed


def _has_environment(pid: int, wanted: bytes) -> bool:
    try:
        return wanted in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
