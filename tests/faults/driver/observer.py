"""Looks at a trial from outside, a few times a second: which process has which run, and what came of failpoints.

Whoever stopped itself at one is continued after a while.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.faults.driver.engines import EngineProcesses, living, send
from tests.faults.driver.evidence import Evidence
from tests.faults.driver.failpoints import Failpoints

_LOOK_SECONDS = 0.2
# A run is written down again after this long though nothing changed: a look before a fault, and one after it.
_AGAIN_SECONDS = 0.8
# One that stopped itself at a failpoint goes on after this long.
_STOP_SECONDS = 1.0
# What an action at a failpoint is among the faults.
_KINDS: Mapping[str, str] = {
    "kill": "failpoint",
    "exit": "failpoint",
    "stop": "stop",
    "sleep": "sleep",
    "raise": "error",
}
# Who dies at a failpoint, by its first part, where it is not a service.
_TARGETS: Mapping[str, str] = {"shim": "shim", "bury": "shim", "planned": "planner", "backup": "backup"}


class Observer:
    """A thread that writes `processes` and those `faults` that processes do to themselves."""

    def __init__(
        self,
        *,
        node_directories: Mapping[str, Path],
        evidence: Evidence,
        failpoints: Failpoints,
        service_of: Callable[[int], str],
    ) -> None:
        """`service_of` gives `control` or `gpu` for a pid of a service, empty for any other."""
        self._node_directories = dict(node_directories)
        self._evidence = evidence
        self._failpoints = failpoints
        self._service_of = service_of
        self._written: dict[EngineProcesses, float] = {}
        self._noted: set[tuple[str, int]] = set()
        # Until when, by pid.
        self._stopped: dict[int, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._observe, name="observer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Looks a last time and ends."""
        self._stopping.set()
        self._thread.join()

    def _observe(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            self._look()
            self._continue_stopped()
        self._look()
        self._continue_stopped(all_of_them=True)

    def _look(self) -> None:
        self._note_failpoints()
        now = time.monotonic()
        for node, directory in self._node_directories.items():
            for found in living(node, directory):
                if found.job_id and now - self._written.get(found, 0.0) >= _AGAIN_SECONDS:
                    self._written[found] = now
                    line = {"at": now, "node": node, "shim_pid": found.shim_pid, "engine_pid": found.engine_pid}
                    line |= {"start_time": found.start_time, "job_id": found.job_id, "attempt": found.attempt}
                    self._evidence.append("processes", line)

    def _note_failpoints(self) -> None:
        for name, pid in self._failpoints.taken():
            if (name, pid) not in self._noted:
                self._noted.add((name, pid))
                target = self._service_of(pid) or _TARGETS.get(name.partition(".")[0], "engine")
                ago = time.time() - self._failpoints.taken_time(name, pid)
                kind = _KINDS[self._failpoints.action_of(name, pid)]
                self._evidence.fault(kind=kind, target=target, failpoint=name, pid=pid, seconds_ago=ago)
                if kind == "stop":
                    self._stopped[pid] = time.monotonic() + _STOP_SECONDS

    def _continue_stopped(self, *, all_of_them: bool = False) -> None:
        for pid, until in list(self._stopped.items()):
            if all_of_them or time.monotonic() >= until:
                del self._stopped[pid]
                if send(pid, signal.SIGCONT):
                    self._evidence.fault(kind="continue", target="", pid=pid)
