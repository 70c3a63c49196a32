"""A service as a real process that is kept alive: whatever ends it, it is started again at its address.

Refuses to restart what ended by itself and in order: a service that leaves is a finding, not something to paper over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.driver.evidence import Evidence
from tests.faults.driver.failpoints import Failpoints

CONTROL = "control"
READY_SECONDS = 120.0
_STOP_SECONDS = 90.0
_LOOK_SECONDS = 0.02
_ROOT = Path(__file__).resolve().parents[3]


def environment(added: Mapping[str, str]) -> dict[str, str]:
    """For a process of ours, started from a checkout; settings from outside stay outside, and so do GPUs: what is
    tried here is processes, and results that are compared to the bit are a CPU's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TUNESMITH_")}
    return {
        **kept,
        "CUDA_VISIBLE_DEVICES": "",
        # What this process was given besides: libraries may lie there.
        "PYTHONPATH": os.pathsep.join(
            part for part in (str(_ROOT), str(_ROOT / "clients" / "python"), os.environ.get("PYTHONPATH", "")) if part
        ),
        **added,
    }


@dataclass(frozen=True, kw_only=True)
class Start:
    """One process of a service that came to serve; moments are of the monotonic clock, as the evidence's."""

    pid: int
    began: float
    served: float

    def seconds(self, faults: Iterable[Mapping[str, Any]]) -> float:
        """What it needed until it served, less the time for which the trial itself had stopped it."""
        held_up_seconds, stopped_at = 0.0, None
        for fault in faults:
            if fault["pid"] != self.pid:
                continue
            # Another process may have had the id at another time.
            at = min(max(fault["at"], self.began), self.served)
            if fault["kind"] == "stop" and stopped_at is None:
                stopped_at = at
            elif fault["kind"] == "continue" and stopped_at is not None:
                held_up_seconds += at - stopped_at
                stopped_at = None
        return self.served - self.began - held_up_seconds


class Service:
    """One service: `control`, or a node by its name."""

    def __init__(
        self,
        name: str,
        module: str,
        flags: Sequence[str],
        *,
        directory: Path,
        variables: Mapping[str, str],
        evidence: Evidence,
        failpoints: Failpoints,
    ) -> None:
        self.name = name
        self.address = ""
        # Each start that came to its ready file.
        self.starts: list[Start] = []
        # Why it could not be kept alive; empty when it could.
        self.problems: list[str] = []
        # Of every process that it ever was.
        self.pids: set[int] = set()
        self._module = module
        self._flags = list(flags)
        self._ready_file = directory / f"{name}.ready.json"
        self.log_file = directory / f"{name}.log"
        self._variables = dict(variables)
        self._evidence = evidence
        self._failpoints = failpoints
        self._stopping = threading.Event()
        self._may_run = threading.Event()
        self._may_run.set()
        # Asked to end in order, and to come back.
        self._restarting = threading.Event()
        # How it ended when it was asked to.
        self.statuses: list[int] = []
        self._ready = threading.Event()
        self._changing = threading.Lock()
        self._process = self._spawn()
        self._keeper = threading.Thread(target=self._keep, name=f"keep-{name}", daemon=True)
        self._keeper.start()

    @property
    def kind(self) -> str:
        """`control` or `gpu`, as faults name it."""
        return CONTROL if self.name == CONTROL else "gpu"

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        return self._process.pid

    def set_flags(self, flags: Sequence[str]) -> None:
        """From the next start on."""
        self._flags = list(flags)

    def wait_ready(self) -> None:
        """Until it serves. AssertionError when it does not come up."""
        deadline = time.monotonic() + READY_SECONDS
        while not self._ready.wait(_LOOK_SECONDS * 10):
            assert not self.problems, f"{self.problems}\n{self.log_tail()}"
            assert time.monotonic() < deadline, f"{self.name} is not ready\n{self.log_tail()}"

    def kill(self, *, hold: bool = False) -> None:
        """SIGKILL. With `hold` it stays down until `release`."""
        if hold:
            self._may_run.clear()
        self._ready.clear()
        self.signal(signal.SIGKILL, "kill")

    def restart(self) -> float:
        """SIGTERM, and a successor at its address; gives the seconds until that serves. `statuses` has how it ended."""
        started, count = time.monotonic(), len(self.statuses)
        self._restarting.set()
        self._ready.clear()
        self.signal(signal.SIGTERM, "term")
        while len(self.statuses) == count:
            assert time.monotonic() < started + _STOP_SECONDS, f"{self.name} does not stop\n{self.log_tail()}"
            time.sleep(_LOOK_SECONDS)
        self.wait_ready()
        return time.monotonic() - started

    def release(self) -> None:
        """Lets it be started again."""
        self._may_run.set()

    def signal(self, number: signal.Signals, kind: str) -> None:
        """Sends a signal and writes it down as a fault."""
        with self._changing:
            pid = self._process.pid
            if self._process.poll() is None:
                self._process.send_signal(number)
                self._evidence.fault(kind=kind, target=self.kind, service=self.name, pid=pid)

    def stop(self) -> int:
        """Ends it in order; gives the exit status."""
        self._stopping.set()
        self._may_run.set()
        with self._changing:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGCONT)
                self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.problems.append(f"{self.name} did not stop within {_STOP_SECONDS:.0f} s")
            self._process.kill()
            status = self._process.wait()
        self._keeper.join()
        return status

    def log_tail(self) -> str:
        """The end of what it printed."""
        return self.log_file.read_text(errors="replace")[-4000:]

    def _spawn(self) -> subprocess.Popen[bytes]:
        # Left by one that was killed: it must not pass for this one.
        self._ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", self._module, *self._flags]
        command += ["--address", self.address or "127.0.0.1:0", "--ready-file", str(self._ready_file)]
        with self.log_file.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                env=environment(self._variables),
            )
        self.pids.add(process.pid)
        return process

    def _keep(self) -> None:
        started = time.monotonic()
        while True:
            self._watch_start(started)
            status = self._process.wait()
            self._ready.clear()
            if self._stopping.is_set():
                return
            if self._restarting.is_set():
                self._restarting.clear()
                self.statuses.append(status)
            elif status != -signal.SIGKILL and not self._failpoints.taken_by(self._process.pid):
                self.problems.append(f"{self.name} ended by itself with status {status}")
                return
            self._may_run.wait()
            with self._changing:
                if self._stopping.is_set():
                    return
                started = time.monotonic()
                self._process = self._spawn()

    def _watch_start(self, started: float) -> None:
        """Until it serves or has ended."""
        while self._process.poll() is None:
            content = self._read_ready()
            if content is not None:
                self.address = content
                self.starts.append(Start(pid=self._process.pid, began=started, served=time.monotonic()))
                self._ready.set()
                return
            time.sleep(_LOOK_SECONDS)

    def _read_ready(self) -> str | None:
        try:
            content = json.loads(self._ready_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return str(content["address"]) if content["pid"] == self._process.pid else None
