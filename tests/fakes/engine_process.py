"""A real engine process on one end of a socket pair; the test plays its shim. Kills what it started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

# Imports of torch and transformers on a busy machine.
_TIMEOUT_SECONDS = 90.0

Notice = dict[str, Any]


class EngineProcess:
    """`python -m gpu_service.engine`, with every notice that it sent. Nothing is ever left of its runs."""

    def __init__(self, log_path: Path, *, device_id: str = "") -> None:
        """`device_id`: what a server says of the engine's device (`cuda:0`)."""
        self.log_path = log_path
        self.notices: list[Notice] = []
        self._arrived = threading.Condition()
        self._sending = threading.Lock()
        self._closed = self._shut = False
        ours, theirs = socket.socketpair()
        self._socket = ours
        with theirs, log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpu_service.engine", "--control-fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdout=log,
                stderr=log,
                # One thread, so that sums are made in one order.
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "MKL_NUM_THREADS": "1",
                    "TUNESMITH_ENGINE_DEVICE": device_id,
                },
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        try:
            self.process.wait(timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(timeout=_TIMEOUT_SECONDS)

    def send(self, **command: Any) -> None:
        """Send one command."""
        with self._sending:
            self._socket.sendall(json.dumps(command).encode() + b"\n")

    def close(self) -> None:
        """Close the pipe, as the death of a shim does."""
        if not self._closed:
            self._shut = True
            self._socket.shutdown(socket.SHUT_WR)

    def wait_for(self, matches: Callable[[Notice], bool]) -> Notice:
        """The first notice, now or later, that matches. Fails when the pipe closes or time is up."""
        with self._arrived:
            checked = 0

            def find() -> Notice | None:
                nonlocal checked
                for notice in self.notices[checked:]:
                    checked += 1
                    if matches(notice):
                        return notice
                return None

            found: list[Notice] = []

            def done() -> bool:
                notice = find()
                if notice is not None:
                    found.append(notice)
                return notice is not None or self._closed

            assert self._arrived.wait_for(done, timeout=_TIMEOUT_SECONDS), f"nothing came; had {self.notices[-5:]}"
            assert found, f"the engine closed its pipe; had {self.notices[-5:]}"
            return found[0]

    def wait_ready(self) -> None:
        self.wait_for(lambda notice: notice["type"] == "ready")

    def run(self, directory: Path) -> Notice:
        """Start a run and wait for its end; the `run_finished` notice."""
        self.send(type="start_run", run_directory=str(directory))
        return self.wait_finished(directory)

    def wait_finished(self, directory: Path) -> Notice:
        return self.wait_for(
            lambda notice: notice["type"] == "run_finished" and notice["run_directory"] == str(directory)
        )

    def wait_phase(self, directory: Path, phase: str) -> None:
        self.wait_for(
            lambda notice: (
                notice["type"] == "phase" and notice["run_directory"] == str(directory) and notice["phase"] == phase
            )
        )

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait_exit(self) -> int:
        return self.process.wait(timeout=_TIMEOUT_SECONDS)

    def _read(self) -> None:
        pending = b""
        while received := self._receive():
            pending += received
            *lines, pending = pending.split(b"\n")
            notices = [json.loads(line) for line in lines]
            for notice in notices:
                # Where the pipe was closed on purpose, nothing is answered.
                if notice["type"] == "clear_run" and not self._shut:
                    self.send(type="run_cleared", run_directory=notice["run_directory"])
            with self._arrived:
                self.notices.extend(notice for notice in notices if notice["type"] != "clear_run")
                self._arrived.notify_all()
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(65536)
        except OSError:
            return b""
