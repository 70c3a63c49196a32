"""The processes of a node's engines as its files name them: found, signalled, ended. Starts none."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

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
