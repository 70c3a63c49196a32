"""Starts the engine process and holds the pipe to it. Exec only; refuses to wait for it.

A run waits for this start, so nothing is imported here that takes long: no journal, and no protobuf with it.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_service.shim import process_tree
from gpu_service.shim.configuration import EngineConfiguration
from gpu_service.shim.protocol import Channel, Message

# Every engine is started with this variable naming its directory: descendants carry it wherever they move.
ENGINE_MARK = "TUNESMITH_ENGINE_DIRECTORY"


class EngineProcess:
    """A started engine. Whoever reaps children reports its end with `has_ended`."""

    def __init__(self, configuration: EngineConfiguration, *, directory: Path, working_directory: Path) -> None:
        """Start it. Raises OSError when the program cannot be executed."""
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {**os.environ, **configuration.environment, ENGINE_MARK: str(directory)}
            self._process = subprocess.Popen(
                [*configuration.argv, "--control-fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=working_directory,
                env=environment,
            )
        self.channel = Channel(ours)
        process = process_tree.facts(self.pid)
        # Our own child that was not reaped: it has an entry even when it has ended.
        self.start_time = process.start_time if process else 0

    def listen(self, selector: selectors.BaseSelector, on_ready: Callable[[int], Any]) -> None:
        """From now on `on_ready(mask)` is called when it can be read from, or takes what is unsent."""
        self._selector = selector
        selector.register(self.channel.connection, selectors.EVENT_READ, on_ready)

    def send(self, message: Message) -> None:
        """Send what it takes now, the rest as it reads. Raises OSError, ProtocolBroken."""
        try:
            self.channel.send(message)
        finally:
            self.watch_writes()

    def watch_writes(self) -> None:
        """Be called for writing too while there is something unsent."""
        key = self._selector.get_map().get(self.channel.connection.fileno())
        if key is not None:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.channel.has_unsent else 0)
            self._selector.modify(self.channel.connection, wanted, key.data)

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self, wait_status: int) -> tuple[int | None, int | None]:
        """Take the wait status of the reaped process: (exit status, None) or (None, signal)."""
        code = os.waitstatus_to_exitcode(wait_status)
        # Popen must not look for a child that is reaped already.
        self._process.returncode = code
        return (None, -code) if code < 0 else (code, None)
