"""The GPU server with a hook that writes down what blocks its event loop: opened files, sleeps, listings, look-ups.

Run as `python -m tests.fakes.watched_gpu_server REPORT [flags of the server]`. Python's audit events say what is done,
whatever time it takes, so a finding does not depend on the machine's load. Not seen: calls without an audit event
(`os.stat`, `os.fsync`), which come with an opened file more often than not.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from gpu_service.main import main

_BLOCKING = frozenset(
    {
        "open",
        "os.listdir",
        "os.scandir",
        "os.mkdir",
        "os.rename",
        "os.link",
        "os.truncate",
        "os.utime",
        "shutil.copyfile",
        "shutil.rmtree",
        "socket.getaddrinfo",
        "time.sleep",
    }
)
# Lazy imports happen once; asyncio starts children on its loop, which waits for their exec only; a traceback reads the
# lines that it shows.
_EXCUSED = ("importlib", "asyncio/base_subprocess.py", "asyncio/unix_events.py", "linecache.py")


def watch(report_path: str) -> None:
    """From now on, append a stack to the report for each blocking call on a thread whose event loop runs."""
    report = Path(report_path).open("a", encoding="utf-8")  # noqa: SIM115 - as long as the process
    state = threading.local()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _BLOCKING or getattr(state, "inside", False) or asyncio._get_running_loop() is None:
            return
        state.inside = True
        try:
            stack = traceback.StackSummary.extract(traceback.walk_stack(sys._getframe(1)), lookup_lines=False)
            frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack]
            # At start and at the end nobody is served yet, or any more: the ready file is written there.
            if not any(part in frame for frame in frames for part in (*_EXCUSED, "_announced")):
                report.write(f"{event} {arguments[:1]!r}\n  " + "\n  ".join(frames[:12]) + "\n")
                report.flush()
        finally:
            state.inside = False

    sys.addaudithook(hook)


if __name__ == "__main__":
    watch(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
