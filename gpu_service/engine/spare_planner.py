"""A planner process that has imported what it needs before a run wants it. Imports no torch, plans nothing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_LOG = logging.getLogger(__name__)

# A request's path is added as the last argument.
PLANNER_COMMAND: tuple[str, ...] = (sys.executable, "-m", "gpu_service.planner")


class SparePlanner:
    """One planner that has imported what it needs, and waits: most of a plan whose tokens are in the cache is that.

    It belongs to no run. It ends when this process does, whose end of its input closes then. Whoever ends what a run
    left of processes ends it too, so it is looked at again before it is used.
    """

    def __init__(self, command: Sequence[str] = (*PLANNER_COMMAND, "--wait")) -> None:
        self._command = tuple(command)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that waits, if one does."""
        return None if self._child is None or self._child.poll() is not None else self._child.pid

    def prepare(self) -> None:
        """Have one waiting. A machine that starts no process now may do so when a run asks for a planner."""
        if self.pid is not None:
            return
        try:
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
            )
        except OSError as error:
            _LOG.warning("no spare planner: %s", error)

    def take(self, request_path: Path, log_path: Path) -> subprocess.Popen[bytes] | None:
        """Give it this request, and give it away. None when there is none."""
        child, self._child = self._child, None
        if child is None or child.stdin is None:
            return None
        line = json.dumps({"request": str(request_path), "log": str(log_path)}) + "\n"
        try:
            with child.stdin as orders:
                orders.write(line.encode())
        except BrokenPipeError:
            _bury(child)
            return None
        return child

    def close(self) -> None:
        """Let go of it: it ends by itself."""
        child, self._child = self._child, None
        if child is not None and child.stdin is not None:
            child.stdin.close()
            _bury(child)


def _bury(child: subprocess.Popen[bytes]) -> None:
    child.wait()
    if child.stdout is not None:
        child.stdout.close()
