"""The engine's end of the control pipe: JSON lines in both directions, read by one small thread.

Runs and generations become entries of a queue; stops reach what they are for at once. A run that arrives ends every
generation. Refuses nothing silently: a line that is no known command is logged. Knows nothing of training.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from gpu_service.engine.generation.order import GenerationOrder
from gpu_service.engine.stopping import StopMode, StopSwitch

_LOG = logging.getLogger(__name__)
_READ_BYTES = 65536
# Signs of progress closer than this to the last are not sent.
_ALIVE_SECONDS = 1.0


class ControlPipe:
    """Reads commands from, and writes notices to, a stream socket."""

    def __init__(
        self, connection: socket.socket, *, on_run: Callable[[Path], None] = lambda run_directory: None
    ) -> None:
        """`on_run` hears of each run before it can be the next order; it must not wait for anything."""
        self._connection = connection
        self._on_run = on_run
        self._orders: SimpleQueue[Path | GenerationOrder | None] = SimpleQueue()
        self._write_lock = threading.Lock()
        self._current: tuple[Path, StopSwitch] | None = None
        # Stops that came for a run before the training thread took it up.
        self._early_stops: dict[Path, StopMode] = {}
        # Generations that are waiting or in hand.
        self._generations: dict[str, GenerationOrder] = {}
        self._shutting_down = False
        self._next_alive = 0.0
        # Set while nothing of a run that is ending is being waited for, and when the shim is gone.
        self._cleared = threading.Event()
        self._closed = False

    @property
    def shutting_down(self) -> bool:
        return self._shutting_down

    def start(self) -> None:
        """Begin to read, in a thread that ends with the process."""
        threading.Thread(target=self._read_commands, name="control", daemon=True).start()

    @property
    def has_order(self) -> bool:
        """Whether something is to be done, the end included."""
        return self._shutting_down or not self._orders.empty()

    def next_order(self) -> Path | GenerationOrder | None:
        """Wait for the next run directory or generation. None means that the engine is to end."""
        if self._shutting_down:
            return None
        return self._orders.get()

    def begin(self, run_directory: Path, switch: StopSwitch) -> None:
        """The training thread takes up a run: stops for it reach `switch` from now on."""
        self._current = (run_directory, switch)
        early = self._early_stops.pop(run_directory, None)
        if early is not None:
            switch.request(early)
        if self._shutting_down:
            switch.request(StopMode.CHECKPOINT)

    def end(self) -> None:
        """The run is over."""
        self._current = None

    def end_generation(self, order: GenerationOrder) -> None:
        """The generation is over."""
        self._generations.pop(order.id, None)

    def shut_down(self) -> None:
        """End the run in hand at a checkpoint, then the engine. Safe in a signal handler."""
        self._shutting_down = True
        self._cancel_generations()
        current = self._current
        if current is not None:
            current[1].request(StopMode.CHECKPOINT)
        self._orders.put(None)

    def notify(self, notice: dict[str, Any]) -> None:
        """Send one notice. A pipe that is gone is not an error: the journal is the truth, and the reader has ended."""
        line = json.dumps(notice, separators=(",", ":")).encode() + b"\n"
        with self._write_lock:
            try:
                self._connection.sendall(line)
            except OSError as error:
                _LOG.debug("notice not sent: %s", error)

    def note_progress(self) -> None:
        """Tell the shim that work goes on; called at each step, pass, batch or token, by whoever made it."""
        now = time.monotonic()
        if now >= self._next_alive:
            self._next_alive = now + _ALIVE_SECONDS
            self.notify({"type": "alive"})

    def announce_pause(self, seconds: float) -> None:
        """Tell the shim that the next sign of progress may take so much longer than others."""
        self._next_alive = 0.0
        self.notify({"type": "alive", "next_pause_seconds": seconds})

    def clear(self, run_directory: Path) -> bool:
        """Have the shim end whatever processes the run left behind, in any session; returns when none is left.

        Only the shim, which inherits them, can find them all. False where it is gone: its burial ends them.
        """
        self._cleared.clear()
        self.notify({"type": "clear_run", "run_directory": str(run_directory)})
        if not self._closed:
            self._cleared.wait()
        return not self._closed

    def _read_commands(self) -> None:
        pending = b""
        while True:
            try:
                received = self._connection.recv(_READ_BYTES)
            except OSError as error:
                _LOG.warning("control pipe failed: %s", error)
                received = b""
            if not received:
                _LOG.info("control pipe closed; ending")
                self.shut_down()
                self._closed = True
                self._cleared.set()
                return
            pending += received
            *lines, pending = pending.split(b"\n")
            for line in lines:
                self._obey(line)

    def _obey(self, line: bytes) -> None:
        try:
            command = json.loads(line)
            kind = command["type"]
            if kind == "start_run":
                self._cancel_generations()
                run_directory = Path(command["run_directory"])
                self._on_run(run_directory)
                self._orders.put(run_directory)
            elif kind == "generate":
                self._add_generation(str(command["generation"]), Path(command["request"]))
            elif kind == "cancel_generate":
                self._cancel_generations(command["generation"])
            elif kind == "stop_run":
                self._stop(Path(command["run_directory"]), StopMode(command["mode"]))
            elif kind == "run_cleared":
                self._cleared.set()
            elif kind == "shutdown":
                self.shut_down()
            else:
                _LOG.warning("unknown command %r", kind)
        except (ValueError, KeyError, TypeError) as error:
            _LOG.warning("command not understood (%s): %r", error, line[:200])

    def _add_generation(self, generation_id: str, request_file: Path) -> None:
        order = GenerationOrder(
            id=generation_id,
            request_file=request_file,
            arrival_seconds=time.monotonic(),
            switch=StopSwitch(self.note_progress),
        )
        self._generations[generation_id] = order
        self._orders.put(order)

    def _cancel_generations(self, generation_id: str | None = None) -> None:
        """End this one, or all, at the next token."""
        # A copy: the main thread takes out what is over.
        for order in list(self._generations.values()):
            if generation_id in (None, order.id):
                order.switch.request(StopMode.CANCEL)

    def _stop(self, run_directory: Path, mode: StopMode) -> None:
        if self._early_stops.get(run_directory) is not StopMode.CANCEL:
            self._early_stops[run_directory] = mode
        current = self._current
        if current is not None and current[0] == run_directory:
            self._early_stops.pop(run_directory, None)
            current[1].request(mode)
