"""How a measured process and the one that alternates between processes speak: lines of JSON over two pipes.

A side runs only while it has the turn, and stands still otherwise: its weights stay on the device, its host thread
waits in a read. So sides alternate within one start of each, on the same device, minutes apart at most. Measures
nothing itself.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_READ_FD, _WRITE_FD = "BENCHMARK_READ_FD", "BENCHMARK_WRITE_FD"
# What the runner tells a side to do next.
GO, PROFILE, END = "go", "profile", "end"
_LOG_TAIL_CHARACTERS = 3000


class SideFailed(Exception):
    """A side ended, or did not answer in time; with the end of what it printed."""


class TurnTaker:
    """The measured process' end."""

    def __init__(self, reads: IO[str], writes: IO[str]) -> None:
        self._reads, self._writes = reads, writes

    @classmethod
    def of_environment(cls) -> TurnTaker:
        """The pipes that this process was started with. Raises KeyError when it was started by hand."""
        return cls(os.fdopen(int(os.environ[_READ_FD])), os.fdopen(int(os.environ[_WRITE_FD]), "w"))

    def tell(self, stage: str, **facts: Any) -> None:
        """Say what was reached."""
        self._writes.write(json.dumps({"stage": stage, **facts}) + "\n")
        self._writes.flush()

    def tell_and_wait(self, stage: str, **facts: Any) -> str:
        """Say what was reached and stand still; what is to be done next. Raises EOFError when the runner is gone."""
        self.tell(stage, **facts)
        line = self._reads.readline()
        if not line:
            raise EOFError("whoever alternates between the sides is gone")
        return str(json.loads(line)["do"])


class MeasuredProcess:
    """The runner's end of one side. Use as a context manager: on leaving, the process is gone."""

    def __init__(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        child_reads, runner_writes = os.pipe()
        runner_reads, child_writes = os.pipe()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(child_reads, child_writes),
                env={**environment, _READ_FD: str(child_reads), _WRITE_FD: str(child_writes)},
            )
        os.close(child_reads)
        os.close(child_writes)
        self._reads, self._writes = runner_reads, os.fdopen(runner_writes, "w")
        self._unread = b""

    def __enter__(self) -> MeasuredProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._reads)
        try:
            self._writes.close()
        except BrokenPipeError:
            # What was not sent is of no use to a process that is gone.
            return

    def tell(self, action: str) -> None:
        """Give the side the turn."""
        self._writes.write(json.dumps({"do": action}) + "\n")
        self._writes.flush()

    def hear(self, stage: str, deadline: float) -> dict[str, Any]:
        """Wait until the side reaches `stage`; what it says. `deadline` is of time.monotonic. Raises SideFailed."""
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._reads], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise SideFailed(f"no word of {stage} in time; it printed:\n{self._tail()}")
            piece = os.read(self._reads, 1 << 16)
            if not piece:
                raise SideFailed(f"ended with status {self._process.wait()} before {stage}:\n{self._tail()}")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        if told.pop("stage") != stage:
            raise SideFailed(f"expected {stage}, heard {line[:300]!r}")
        return told

    def _tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL_CHARACTERS:]


def python_command(module: str, arguments: Sequence[str]) -> list[str]:
    """This interpreter running a module."""
    return [sys.executable, "-m", module, *arguments]
