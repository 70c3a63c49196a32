"""What the processes of an engine that hangs were doing: the engine's own stacks, and what the kernel says of each.

An engine that catches STACKS_SIGNAL writes the Python frames of all its threads to its log, by a handler in C that
needs no lock of the interpreter's. One that is stopped, or sits in the kernel, does not; then the kernel's word is all
there is. Refuses to signal a process that would die of it, to wait for long, and to give more than a screenful.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

# A real-time one: LLVM, which Triton compiles kernels with, takes SIGUSR1 from whoever had it (its
# lib/Support/Unix/Signals.inc).
STACKS_SIGNAL = signal.SIGRTMIN
# What faulthandler begins with when a signal is deadly, and of the thread that took a signal.
_CRASH_HEAD = "Fatal Python error"
CURRENT_THREAD = "Current thread"
_DEADLY_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
_WAIT_SECONDS = 2.0
_QUIET_SECONDS = 0.2
_LOOK_AGAIN_SECONDS = 0.02
_MAX_CHARACTERS = 12_000
_MAX_LOG_BYTES = 2**20
_MAX_PROCESSES = 16
_MAX_THREADS = 8
_PROC = Path("/proc")


def capture(*, engine_pid: int, members: list[int], log: Path) -> str:
    """Stacks of the engine and a line a thread of every process of `members`. Takes at most about two seconds."""
    return f"{_python_stacks(engine_pid, log)}\n{_kernel_view(members)}"[:_MAX_CHARACTERS]


def of_crash(signal_number: int | None, log: Path) -> str:
    """What the engine wrote of a deadly signal before it died of it; empty for any other end."""
    if signal_number not in _DEADLY_SIGNALS:
        return ""
    text = _read_from(log, max(0, _size(log) - 4 * _MAX_CHARACTERS))
    head = text.rfind(_CRASH_HEAD)
    title, gap, threads = text[head:].partition("\n\n") if head >= 0 else ("", "", "")
    return f"{title}{gap}{_current_first(threads)}"[:_MAX_CHARACTERS]


def _python_stacks(engine_pid: int, log: Path) -> str:
    if not _catches(engine_pid):
        return "the engine does not tell its stacks"
    start = _size(log)
    os.kill(engine_pid, STACKS_SIGNAL)
    deadline = time.monotonic() + _WAIT_SECONDS
    size, grown_at = start, 0.0
    while (now := time.monotonic()) < deadline:
        found = _size(log)
        if found > size:
            size, grown_at = found, now
        elif size > start and now - grown_at >= _QUIET_SECONDS:
            break
        time.sleep(_LOOK_AGAIN_SECONDS)
    told = _current_first(_read_from(log, start).strip())
    return told or f"the engine did not tell its stacks within {_WAIT_SECONDS:g} s"


def _current_first(told: str) -> str:
    """The thread that took the signal, as a rule the one that trains, before those that wait for work.

    It is the oldest and comes last, and behind many others a screenful does not reach it.
    """
    begin = told.find(CURRENT_THREAD)
    if begin < 0:
        return told
    end = told.find("\n\n", begin)
    end = len(told) if end < 0 else end
    return f"{told[begin:end].rstrip()}\n\n{told[:begin]}{told[end:].lstrip()}".rstrip()


def _catches(pid: int) -> bool:
    """Whether the process has a handler: without one the signal would end it before anything was learned."""
    mask = _field(_PROC / str(pid) / "status", "SigCgt:")
    return bool(mask) and bool(int(mask, 16) >> (STACKS_SIGNAL - 1) & 1)


def _kernel_view(members: list[int]) -> str:
    lines: list[str] = []
    for pid in members[:_MAX_PROCESSES]:
        status = _PROC / str(pid) / "status"
        lines.append(f"process {pid} ({_field(status, 'Name:')}): {_field(status, 'State:')}")
        for thread in _threads(pid)[:_MAX_THREADS]:
            state = _field(thread / "status", "State:")
            where, call = _read(thread / "wchan") or "?", _read(thread / "syscall") or "?"
            lines.append(f"  thread {thread.name}: {state}, kernel function {where}, system call {call.split()[0]}")
            # For the superuser only.
            lines.extend(f"    {line}" for line in _read(thread / "stack").splitlines())
    return "\n".join(lines)


def describe_stuck(members: list[int]) -> str:
    """Processes that were killed and are there all the same, with their states in the kernel's words; empty for none.

    A dead one that its parent has not reaped holds nothing.
    """
    states = {pid: _field(_PROC / str(pid) / "status", "State:") for pid in members}
    found = [f"{pid} in state {state}" for pid, state in states.items() if state and not state.startswith("Z")]
    return f"processes that were killed do not end: {', '.join(found[:_MAX_PROCESSES])}" if found else ""


def _threads(pid: int) -> list[Path]:
    try:
        return sorted((_PROC / str(pid) / "task").iterdir(), key=lambda path: int(path.name))
    except OSError:
        return []


def _field(path: Path, name: str) -> str:
    for line in _read(path).splitlines():
        if line.startswith(name):
            return " ".join(line.removeprefix(name).split())
    return ""


def _read(path: Path) -> str:
    """Empty for what is gone, or not for us to read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:
        return 0


def _read_from(log: Path, start: int) -> str:
    try:
        with log.open("rb") as stream:
            stream.seek(start)
            return stream.read(_MAX_LOG_BYTES).decode(errors="replace")
    except OSError:
        return ""
