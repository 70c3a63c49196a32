"""The processes of a node's engines as its files name them: found, observed, killed, stopped. Starts none."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.driver.evidence import Evidence

_LOOK_SECONDS = 0.25
_ENGINE_MARK = b"TUNESMITH_ENGINE_DIRECTORY="


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineProcesses:
    """A shim that lives, and its engine."""

    node: str
    directory: Path
    shim_pid: int
    engine_pid: int
    # Clock ticks since boot, as /proc says.
    start_time: int
    # Empty without a run.
    job_id: str
    attempt: int


def living(node: str, node_directory: Path) -> Iterator[EngineProcesses]:
    """Every shim of the node that lives."""
    for path in node_directory.glob("engines/*/shim.json"):
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            record = json.loads(path.read_text(encoding="utf-8"))
            if _start_time(record["shim_pid"]) != record["shim_start_time"]:
                continue
            run = Path(record["run_directory"]) if record["run_directory"] else None
            yield EngineProcesses(
                node=node,
                directory=path.parent,
                shim_pid=record["shim_pid"],
                engine_pid=record["engine_pid"],
                start_time=record["engine_start_time"],
                job_id=run.parent.name if run else "",
                attempt=int(run.name) if run else 0,
            )


def _start_time(pid: int) -> int | None:
    """None when there is no such process, or it has ended and was not reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


class EngineObserver:
    """A thread that writes down which process has which run, whenever that changes."""

    def __init__(self, node_directories: Mapping[str, Path], evidence: Evidence) -> None:
        self._node_directories = dict(node_directories)
        self._evidence = evidence
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._observe, name="observer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it."""
        self._stopping.set()
        self._thread.join()

    def _observe(self) -> None:
        seen: set[EngineProcesses] = set()
        while not self._stopping.wait(_LOOK_SECONDS):
            now = {
                found
                for node, directory in self._node_directories.items()
                for found in living(node, directory)
                if found.job_id
            }
            for found in now - seen:
                line = {"at": time.monotonic(), "node": found.node, "shim_pid": found.shim_pid}
                line |= {"engine_pid": found.engine_pid, "start_time": found.start_time}
                self._evidence.append("processes", line | {"job_id": found.job_id, "attempt": found.attempt})
            seen = now


def send(pid: int, number: signal.Signals) -> bool:
    """Signals a process; False when it is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def end_all(node_directory: Path) -> list[int]:
    """Kills whatever still belongs to an engine of the node; gives the pids."""
    killed = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            marks = Path(f"/proc/{process.pid}/environ").read_bytes()
            mark = _ENGINE_MARK + str(node_directory).encode()
            if mark in marks or any(str(node_directory / "engines") in word for word in process.cmdline()):
                process.kill()
                killed.append(process.pid)
    return killed
